"""The bitwise multi-scale tokenizer of Infinity: encoder, binary spherical quantisation over scales, decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from fastvar.models.autoencoder import check_images, to_channels_last
from fastvar.models.scale_tokenizer import ScaleTokenizer, ScaleTokenizerConfig, TokenizerOutput
from fastvar.ops import QuantizedBits, accumulate_bits, bitwise_residual_quantize
from fastvar.ranges import Count, NotNegative, OneOf, Range, ShareBelowOne
from fastvar.schedule import ScaleSchedule, infinity_schedule

SHARPNESS = 100.0  # of the soft bits whose entropy the training loss measures, as in the public code


@dataclass(frozen=True)
class BSQTokenizerConfig(ScaleTokenizerConfig):
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
        super().__post_init__()
        if self.patchify and self.bits % 4:
            raise ValueError(f"BSQTokenizerConfig: bits: expected a multiple of 4 with patchify, got {self.bits}")

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        return self.bits // 4 if self.patchify else self.bits

    @property
    def code_channels(self) -> int:
        """Channels of a token's input: one for each bit."""
        return self.bits

    @property
    def downsampling(self) -> int:
        """Pixels per side of a token of the finest grid."""
        return (2 if self.patchify else 1) * super().downsampling


class BSQTokenizer(ScaleTokenizer):
    """Images (B, 3, H, W) in [-1, 1] to bits (B, L, d) bool and back, over any schedule, see `ScaleTokenizer`."""

    config_class = BSQTokenizerConfig

    def __init__(self, config: BSQTokenizerConfig) -> None:
        super().__init__(config, config.feature_channels, attention=False)
        to_channels_last(self)

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

    def codes(self, bits: torch.Tensor) -> torch.Tensor:
        return (bits.to(self.decoder.conv_in.weight.dtype) * 2 - 1) * self.config.feature_channels**-0.5

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

    def _accumulated(
        self, tokens: torch.Tensor, schedule: ScaleSchedule | None, **how: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        if tokens.ndim != 3 or tokens.shape[2] != self.config.bits or tokens.is_floating_point():
            raise ValueError(
                f"BSQTokenizer: bits: expected bits (B, L, {self.config.bits}), "
                f"got {tokens.dtype} {tuple(tokens.shape)}"
            )
        return super()._accumulated(tokens.bool(), schedule, **how)

    def teacher_forcing(  # type: ignore[override]  # one argument more
        self, bits: torch.Tensor, next_input: str | None = None, *, schedule: ScaleSchedule | None = None
    ) -> torch.Tensor:
        """As `ScaleTokenizer.teacher_forcing`, of bits (B, L, d), bool or integers 0 and 1.

        Args:
            bits: of all scales, or of the first ones.
            next_input: "bilinear", as Infinity's sampler and training do, or "area", as its tokenizer does; the
                config's by default.
            schedule: the grids; the config's by default.
        """
        return super().teacher_forcing(bits, schedule=schedule, next_input=next_input)

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
        schedule = schedule or self.schedule
        return ScaleSchedule([(2 * h, 2 * w) for h, w in schedule]) if self.config.patchify else schedule

    def _tokens(self, rows: torch.Tensor, cells: ScaleSchedule, first_scale: int = 0) -> torch.Tensor:
        """As in `ScaleTokenizer`, from a scale on."""
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
