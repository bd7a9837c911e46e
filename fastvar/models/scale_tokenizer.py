"""What the tokenizers over scales have in common, be their tokens classes of a codebook or bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.autoencoder import Decoder, Encoder
from fastvar.models.pretrained import PretrainedModel
from fastvar.models.tiles import in_tiles
from fastvar.ranges import check_fields
from fastvar.schedule import ScaleSchedule


class ScaleTokenizerConfig:
    """The shape of a tokenizer: its dataclass has these fields."""

    grids: tuple[tuple[int, int], ...]
    channels: int
    channel_multipliers: tuple[int, ...]
    norm_groups: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)  # lists, as they come from JSON
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        check_fields(self)
        if not self.channel_multipliers:
            raise ValueError(f"{name}: channel_multipliers: expected at least one, got none")
        widths = [self.channels * m for m in (1, *self.channel_multipliers)]
        if any(width % self.norm_groups for width in widths):
            raise ValueError(
                f"{name}: norm_groups: expected a divisor of all widths {sorted(set(widths))}, got {self.norm_groups}"
            )

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def downsampling(self) -> int:
        """Pixels per side of a token of the finest grid."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images in pixels."""
        return self.image_size_of(self.schedule)

    def image_size_of(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """(H, W) in pixels of the images of another schedule."""
        height, width = schedule.finest
        return height * self.downsampling, width * self.downsampling


class TokenizerOutput(NamedTuple):
    """What a tokenizer answers in training.

    Attributes:
        reconstruction: (B, 3, H, W), not clamped.
        quantization_loss: scalar, see `forward` of the tokenizer.
        tokens: (B, L) int64, or bits (B, L, d) bool.
        usage: int64, how often each code, or each value of a bit, is among the tokens.
    """

    reconstruction: torch.Tensor
    quantization_loss: torch.Tensor
    tokens: torch.Tensor
    usage: torch.Tensor


class ScaleTokenizer(PretrainedModel):
    """Images (B, 3, H, W) in [-1, 1] to tokens, classes (B, L) int64 or bits (B, L, d) bool, and back.

    What goes from images to tokens or back takes another schedule than the config's, for images of another size;
    `decode_features` takes a feature map of any size.
    """

    schedule: ScaleSchedule

    def __init__(self, config: Any, feature_channels: int, *, attention: bool) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        shape: dict[str, Any] = {
            "blocks_per_level": config.blocks_per_level,
            "norm_groups": config.norm_groups,
            "dropout": config.dropout,
            "attention": attention,
        }
        self.encoder = Encoder(config.channels, config.channel_multipliers, feature_channels, **shape)
        self.decoder = Decoder(config.channels, config.channel_multipliers, feature_channels, **shape)

    # -- what a tokenizer says of itself -----------------------------------------------------------------------------

    def quantize(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> Any:
        """Images to tokens, feature map and the inputs of teacher forcing in one go."""
        raise NotImplementedError

    def codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of any scales to their codes (B, n, C), without what coarser scales and upsampling make of them."""
        raise NotImplementedError

    def accumulate(
        self, tokens: torch.Tensor, feature_map: torch.Tensor, scale: int, *, schedule: ScaleSchedule | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the tokens of a scale to the feature map (B, c, h, w); the second result is the next scale's input
        (B, n_{k+1}, C), None after the last one."""
        raise NotImplementedError

    def sampled_with(self) -> tuple[list[nn.Module], list[torch.Tensor]]:
        """The modules that sampling and decoding run, and weights that it reads besides."""
        return [self.decoder], []

    def _features_to_images(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.decoder(feature_map)

    def _cells(self, schedule: ScaleSchedule | None) -> ScaleSchedule:
        """The grids of the feature map's cells."""
        return schedule or self.schedule

    def _tokens(self, rows: torch.Tensor, cells: ScaleSchedule) -> torch.Tensor:
        """Rows of cells (B, sum of cells, c) to rows of tokens (B, sum of n_k, C)."""
        return rows

    # -- what all have -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to tokens."""
        tokens: torch.Tensor = self.quantize(images, schedule=schedule)[0]
        return tokens

    def empty_feature_map(self, batch: int, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """The feature map (B, c, h, w) before the first scale, float32 at least."""
        weight = self.decoder.conv_in.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = self._cells(schedule).finest
        return torch.zeros(batch, weight.shape[1], *size, dtype=dtype, device=weight.device)

    def _accumulated(
        self, tokens: torch.Tensor, schedule: ScaleSchedule | None, **how: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """What `accumulate` makes of the tokens of the first scales, after each."""
        schedule = schedule or self.schedule
        feature_map = self.empty_feature_map(len(tokens), schedule)
        for k, of_scale in enumerate(tokens.split(schedule.with_num_tokens(tokens.shape[1]).lengths, 1)):
            feature_map, following = self.accumulate(of_scale, feature_map, k, schedule=schedule, **how)
            yield feature_map, following

    @torch.no_grad()
    def teacher_forcing(
        self, tokens: torch.Tensor, *, schedule: ScaleSchedule | None = None, **how: Any
    ) -> torch.Tensor:
        """Tokens to a transformer's inputs (B, L - n_1, C): for each scale after the first one, the feature map of the
        scales before it, resampled to its grid. Tokens of the first m scales give the inputs up to m."""
        inputs = [self.empty_feature_map(len(tokens), schedule).new_zeros(len(tokens), 0, self.config.code_channels)]
        for _, following in self._accumulated(tokens, schedule, **how):
            inputs += [] if following is None else [following]
        return torch.cat(inputs, 1)[:, : tokens.shape[1] - (schedule or self.schedule).lengths[0]]

    @torch.no_grad()
    def feature_map(self, tokens: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Tokens, or those of the first m scales, to the accumulated feature map (B, c, h, w)."""
        *_, (feature_map, _) = self._accumulated(tokens, schedule)
        return feature_map

    @torch.no_grad()
    def pyramid(self, tokens: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Tokens to the prefix of a reference subject (B, L, C): the complete feature map, area-resampled to every grid
        of the schedule."""
        feature_map, cells = self.feature_map(tokens, schedule=schedule), self._cells(schedule)
        rows = torch.cat([F.interpolate(feature_map, grid, mode="area").flatten(2).mT for grid in cells], 1)
        return self._tokens(rows, cells).contiguous()

    def decode_features(
        self,
        feature_map: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> torch.Tensor:
        """Feature map (B, c, h, w) to images (B, 3, H, W), not clamped.

        In tiles it takes the memory of a tile, and some time more. The picture is then a little different: group norms
        take their statistics, and attention its keys, of a tile and what overlaps instead of the whole. Overlapping
        tiles fade into each other, so that no seam shows.

        Args:
            feature_map: of all scales, or of the first ones.
            dtype: bfloat16 or float16 to compute in it (by autocast: the weights stay as they are); None for the
                weights' own.
            tile: decode in tiles of so many cells a side; None, or no less than both sides, for the whole at once.
            overlap: cells that a tile is decoded with besides, at each side, at most `tile`; a quarter of it by
                default.

        Raises:
            ValueError: a tile or an overlap out of range.
        """
        if tile is not None and tile < 1:
            raise ValueError(f"{type(self).__name__}: tile: expected at least 1, got {tile}")
        tile = max(feature_map.shape[2:]) if tile is None else tile
        overlap = -(-tile // 4) if overlap is None else overlap
        if not 0 <= overlap <= tile:
            raise ValueError(f"{type(self).__name__}: overlap: expected 0 to {tile}, got {overlap}")
        own = self.decoder.conv_in.weight.dtype
        low = dtype is not None and dtype.itemsize < own.itemsize
        with torch.autocast(feature_map.device.type, dtype) if low else nullcontext():
            return in_tiles(self._features_to_images, feature_map.to(own), tile, overlap).contiguous()

    @torch.no_grad()
    def decode(
        self,
        tokens: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        schedule: ScaleSchedule | None = None,
    ) -> torch.Tensor:
        """Tokens, or those of the first m scales, to images (B, 3, H, W) in [-1, 1]; dtype, tile, overlap: see
        `decode_features`."""
        feature_map = self.feature_map(tokens, schedule=schedule)
        return self.decode_features(feature_map, dtype=dtype, tile=tile, overlap=overlap).clamp(-1, 1)
