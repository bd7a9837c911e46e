"""The bitwise multi-scale tokenizer of Infinity: encoder, binary spherical quantisation over scales, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.autoencoder import Decoder, Encoder, check_images, to_channels_last
from fastvar.models.pretrained import PretrainedModel
from fastvar.models.vq_tokenizer import TokenizerOutput
from fastvar.ops import QuantizedBits, accumulate_bits, bitwise_residual_quantize
from fastvar.ranges import Count, NotNegative, OneOf, Range, ShareBelowOne, check_fields
from fastvar.schedule import ScaleSchedule, infinity_schedule

SHARPNESS = 100.0  # of the soft bits whose entropy the training loss measures, as in the public code


@dataclass(frozen=True)
class BSQTokenizerConfig:
    """Shape of a `BSQTokenizer`; the defaults are those of the public d32 tokenizer (110 M parameters)."""

    grids: tuple[tuple[int, int], ...] = infinity_schedule("1M").grids
    """Token grids (height, width), coarse to fine, unless a call names others."""
    bits: Count = 32
    """d, bits of a token."""
    patchify: bool = False
    """A token holds the bits of 2 x 2 cells of the feature map, which has a quarter as many channels."""
    next_input: Annotated[str, OneOf("bilinear", "area")] = "bilinear"
    """How a scale's input is made of the feature map before it, see `fastvar.ops.bitwise_residual_quantize`."""
    channels: Count = 128
    """Width of the first convolution."""
    channel_multipliers: Annotated[tuple[int, ...], Range(1)] = (1, 2, 4, 4, 4)
    """Width of each resolution in units of `channels`; a cell of the feature map is 2^(len - 1) pixels wide."""
    blocks_per_level: Count = 2
    norm_groups: Count = 32
    dropout: ShareBelowOne = 0.0
    commitment_weight: NotNegative = 0.25
    entropy_weight: NotNegative = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)  # lists, as they come from JSON
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        check_fields(self)
        if not self.channel_multipliers:
            raise ValueError("BSQTokenizerConfig: channel_multipliers: expected at least one, got none")
        widths = [self.channels * m for m in (1, *self.channel_multipliers)]
        if any(width % self.norm_groups for width in widths):
            raise ValueError(
                f"BSQTokenizerConfig: norm_groups: expected a divisor of all widths {sorted(set(widths))}, "
                f"got {self.norm_groups}"
            )
        if self.patchify and self.bits % 4:
            raise ValueError(f"BSQTokenizerConfig: bits: expected a multiple of 4 with patchify, got {self.bits}")

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        return self.bits // 4 if self.patchify else self.bits

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images in pixels."""
        return self.image_size_of(self.schedule)

    def image_size_of(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """(H, W) in pixels of the images of another schedule."""
        height, width = schedule.finest
        side = (2 if self.patchify else 1) * 2 ** (len(self.channel_multipliers) - 1)
        return height * side, width * side


class BSQTokenizer(PretrainedModel):
    """Images (B, 3, H, W) in [-1, 1] to bits (B, L, d) and back.

    Every method takes another schedule than the config's, for images of another size.
    """

    config_class = BSQTokenizerConfig

    def __init__(self, config: BSQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        shape: dict[str, Any] = {
            "blocks_per_level": config.blocks_per_level,
            "norm_groups": config.norm_groups,
            "dropout": config.dropout,
            "attention": False,
        }
        self.encoder = Encoder(config.channels, config.channel_multipliers, config.feature_channels, **shape)
        self.decoder = Decoder(config.channels, config.channel_multipliers, config.feature_channels, **shape)
        to_channels_last(self)

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode_features(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to continuous features (B, c, h, w), float32 at least."""
        check_images("BSQTokenizer", images, self.config.image_size_of(schedule or self.schedule))
        features = self.encoder(images.to(self.encoder.conv_in.weight.dtype))
        return features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()

    @torch.no_grad()
    def quantize(
        self,
        images: torch.Tensor,
        *,
        next_input: str | None = None,
        flip_probability: Sequence[float] | torch.Tensor | None = None,
        seed: int = 0,
        first_image: int = 0,
        schedule: ScaleSchedule | None = None,
    ) -> QuantizedBits:
        """Images (B, 3, H, W) to bits, feature map and the inputs of teacher forcing in one go.

        With flips, this is bitwise self-correction: the inputs are of bits some of which were flipped, the bits
        returned are the ones that correct that. Autocast is off inside: the sign of a feature must not depend on
        whether a model is in training.

        Args:
            images: in [-1, 1].
            next_input: "bilinear" or "area"; the config's by default.
            flip_probability: (K,), see `self_correction`.
            seed, first_image: of the flips, see `fastvar.ops.bitwise_residual_quantize`.
            schedule: the grids; the config's by default.

        Returns:
            bits (B, L, d) bool, feature_map (B, c, h, w), teacher_forcing (B, L - n_1, d).
        """
        check_images("BSQTokenizer", images, self.config.image_size_of(schedule or self.schedule))
        with torch.autocast(images.device.type, enabled=False):
            features = self.encode_features(images, schedule=schedule)
            cells = self._cells(schedule)
            found = bitwise_residual_quantize(
                features,
                cells,
                next_input=next_input or self.config.next_input,
                flip_probability=flip_probability,
                seed=seed,
                first_image=first_image,
            )
        inputs = self._tokens(found.teacher_forcing, cells, 1)
        return QuantizedBits(self._tokens(found.bits, cells), found.feature_map, inputs)

    def encode(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to bits (B, L, d) bool."""
        return self.quantize(images, schedule=schedule).bits

    def accumulate(
        self,
        bits: torch.Tensor,
        feature_map: torch.Tensor,
        scale: int,
        *,
        next_input: str | None = None,
        schedule: ScaleSchedule | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the bits (B, n_k, d) of a scale to the feature map (B, c, h, w); the second result is the next scale's
        input (B, n_{k+1}, d), None after the last one."""
        cells, channels = self._cells(schedule), self.config.feature_channels
        if self.config.patchify:
            h, w = cells[scale]
            patches = bits.unflatten(2, (channels, 2, 2)).unflatten(1, (h // 2, w // 2))
            bits = patches.permute(0, 1, 4, 2, 5, 3).reshape(len(bits), h * w, channels)
        feature_map, following = accumulate_bits(
            bits, feature_map, cells, scale, next_input=next_input or self.config.next_input
        )
        return feature_map, None if following is None else self._patches(following, cells[scale + 1])

    def empty_feature_map(self, batch: int, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """The feature map (B, c, h, w) before the first scale."""
        weight = self.decoder.conv_in.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = self._cells(schedule).finest
        return torch.zeros(batch, self.config.feature_channels, *size, dtype=dtype, device=weight.device)

    def sampled_with(self) -> tuple[list[nn.Module], list[torch.Tensor]]:
        """The modules that sampling and decoding run, and weights that it reads besides."""
        return [self.decoder], []

    def _accumulate(
        self, bits: torch.Tensor, next_input: str | None, schedule: ScaleSchedule | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The feature map of the bits (B, L', d) of the first scales, and the inputs of the scales after each."""
        schedule = schedule or self.schedule
        if bits.ndim != 3 or bits.shape[2] != self.config.bits or bits.is_floating_point():
            raise ValueError(
                f"BSQTokenizer: bits: expected bits (B, L, {self.config.bits}), got {bits.dtype} {tuple(bits.shape)}"
            )
        feature_map, inputs = self.empty_feature_map(len(bits), schedule), []
        given = schedule.with_num_tokens(bits.shape[1])
        for k, of_scale in enumerate(bits.bool().split(given.lengths, 1)):
            feature_map, following = self.accumulate(of_scale, feature_map, k, next_input=next_input, schedule=schedule)
            if following is not None:
                inputs.append(following)
        return feature_map, inputs

    @torch.no_grad()
    def teacher_forcing(
        self, bits: torch.Tensor, next_input: str | None = None, *, schedule: ScaleSchedule | None = None
    ) -> torch.Tensor:
        """Bits (B, L, d) to a transformer's inputs (B, L - n_1, d): for each scale after the first one, the feature map
        of the scales before it, resampled to its grid. Bits of the first m scales give the inputs up to m.

        Args:
            bits: bool, or integers 0 and 1.
            next_input: "bilinear", as Infinity's sampler and training do, or "area", as its tokenizer does; the
                config's by default.
            schedule: the grids; the config's by default.
        """
        feature_map, inputs = self._accumulate(bits, next_input, schedule)
        empty = feature_map.new_zeros(len(bits), 0, self.config.bits)
        return torch.cat([empty, *inputs], 1)[:, : bits.shape[1] - (schedule or self.schedule).lengths[0]]

    @torch.no_grad()
    def feature_map(self, bits: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Bits (B, L, d), or those of the first m scales, to the accumulated feature map (B, c, h, w)."""
        return self._accumulate(bits, None, schedule)[0]

    @torch.no_grad()
    def pyramid(self, bits: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Bits (B, L, d) to the prefix of a reference subject (B, L, d): the complete feature map, area-resampled to
        every grid of the schedule."""
        feature_map = self.feature_map(bits, schedule=schedule)
        cells = self._cells(schedule)
        rows = torch.cat([F.interpolate(feature_map, grid, mode="area").flatten(2).mT for grid in cells], 1)
        return self._tokens(rows, cells).contiguous()

    def decode_features(self, feature_map: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Feature map (B, c, h, w) to images (B, 3, H, W), not clamped.

        Args:
            feature_map: of all scales, or of the first ones.
            dtype: bfloat16 or float16 to compute in it (by autocast: the weights stay as they are); None for the
                weights' own.
        """
        own = self.decoder.conv_in.weight.dtype
        low = dtype is not None and dtype.itemsize < own.itemsize
        with torch.autocast(feature_map.device.type, dtype) if low else nullcontext():
            return self.decoder(feature_map.to(own)).contiguous()

    @torch.no_grad()
    def decode(
        self, bits: torch.Tensor, *, dtype: torch.dtype | None = None, schedule: ScaleSchedule | None = None
    ) -> torch.Tensor:
        """Bits (B, L, d), or those of the first m scales, to images (B, 3, H, W) in [-1, 1]; dtype: see
        `decode_features`."""
        return self.decode_features(self.feature_map(bits, schedule=schedule), dtype=dtype).clamp(-1, 1)

    def forward(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> TokenizerOutput:
        """The training pass: at each scale a straight-through gradient to the residual, normalised to length one.

        The quantisation loss is the mean over scales of commitment_weight |u - code|^2, with u the normalised residual,
        plus entropy_weight (mean entropy of a token's soft bits - entropy of the mean soft bits) / 100, where bit i is
        1 with probability sigmoid(400 u_i / sqrt(c)): each bit is to be certain, and used.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            schedule: the grids; the config's by default.

        Returns:
            reconstruction (B, 3, H, W), quantization_loss, tokens: the bits (B, L, d) bool, and usage: (2 c,) int64,
            how often each channel's bit is 0 (the first c) and 1.

        Source: BSQ (arXiv 2406.07548); the residual pyramid is VAR's (arXiv 2404.02905). The public Infinity code sets
            both losses to zero.
        """
        features = self.encode_features(images, schedule=schedule)
        cells, channels = self._cells(schedule), self.config.feature_channels
        with torch.autocast(features.device.type, enabled=False):
            bits = bitwise_residual_quantize(features, cells).bits
            feature_map, losses = torch.zeros_like(features), []
            for k, grid in enumerate(cells):
                residual = F.interpolate(features - feature_map.detach(), grid, mode="area").flatten(2)
                unit = F.normalize(residual, dim=1)  # [B, c, n_k]
                signs = bits[:, cells.starts[k] : cells.ends[k]].mT.to(unit.dtype) * 2 - 1
                code = signs * channels**-0.5
                sent = (unit + (code - unit).detach()).unflatten(2, grid)
                feature_map = feature_map + F.interpolate(sent, cells.finest, mode="bilinear")
                losses.append(self._quantization_loss(unit, code))
        reconstruction = self.decode_features(feature_map)
        ones = bits.flatten(0, 1).sum(0)
        usage = torch.cat([bits.shape[0] * bits.shape[1] - ones, ones])
        return TokenizerOutput(reconstruction, torch.stack(losses).mean(), self._tokens(bits, cells), usage)

    def _quantization_loss(self, unit: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        commitment = (unit - code).square().sum(1).mean()
        logits = 4 * SHARPNESS * unit.shape[1] ** -0.5 * unit
        chance = logits.sigmoid()
        each = (-F.logsigmoid(-logits) - logits * chance).sum(1).mean()
        mean = chance.mean((0, 2)).clamp(1e-7, 1 - 1e-7)  # at 0 and 1 its entropy has no gradient
        together = (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()
        config = self.config
        return config.commitment_weight * commitment + config.entropy_weight * (each - together) / SHARPNESS

    # -- tokens of 2 x 2 cells ---------------------------------------------------------------------------------------

    def _cells(self, schedule: ScaleSchedule | None) -> ScaleSchedule:
        """The grids of the feature map's cells."""
        schedule = schedule or self.schedule
        return ScaleSchedule([(2 * h, 2 * w) for h, w in schedule]) if self.config.patchify else schedule

    def _tokens(self, rows: torch.Tensor, cells: ScaleSchedule, first_scale: int = 0) -> torch.Tensor:
        """Rows of cells (B, sum of cells, c) to rows of tokens (B, sum of n_k, d), from a scale on."""
        if not self.config.patchify:
            return rows
        scales = range(first_scale, len(cells))
        parts = rows.split([cells.lengths[k] for k in scales], 1)
        empty = rows.new_zeros(len(rows), 0, self.config.bits)
        return torch.cat([empty, *(self._patches(part, cells[k]) for k, part in zip(scales, parts, strict=True))], 1)

    def _patches(self, rows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, h w, c) to (B, h w / 4, 4 c), the order of channels that of `torch.nn.functional.pixel_unshuffle`."""
        if not self.config.patchify:
            return rows
        h, w = grid
        patches = rows.unflatten(1, (h // 2, 2, w // 2, 2)).permute(0, 1, 3, 5, 2, 4)
        return patches.reshape(len(rows), h * w // 4, self.config.bits)


def self_correction(
    num_scales: int, *, strength: float = 0.3, scales: int = 13, generator: torch.Generator | None = None
) -> list[float]:
    """Infinity's probabilities of a flip for `BSQTokenizer.quantize`, (K,): of each of the first scales a whole number
    of per cent, uniform from 0 to `strength`; 0 of the others. Drawn anew for each batch.

    Raises:
        ValueError: a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"self_correction: strength: expected 0 to 1, got {strength}")
    drawn = torch.randint(0, round(100 * strength) + 1, (num_scales,), generator=generator).tolist()
    return [percent / 100 if k < scales else 0.0 for k, percent in enumerate(drawn)]
