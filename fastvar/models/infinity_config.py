"""The shape of an Infinity, and the shapes that are registered by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from fastvar.models.injection import SUBJECTS
from fastvar.ranges import Count, NotNegative, Number, OneOf, Positive, Share, ShareBelowOne, check_fields
from fastvar.schedule import ScaleSchedule, infinity_schedule


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an `Infinity`; the defaults are those of the public Infinity-2B."""

    grids: tuple[tuple[int, int], ...] = infinity_schedule("1M").grids
    """Token grids (height, width), coarse to fine, unless a call names others; the first has one token."""
    depth: Count = 32
    embed_dim: Count = 2048
    num_heads: Count = 16
    mlp_ratio: Positive = 4.0
    """Width of the MLP in units of `embed_dim`; public models round it to a multiple of 256, see `named`."""
    bits: Count = 32
    """d, bits of a token."""
    max_scales: Count = 15
    """The most scales that a schedule may have."""
    text_channels: Count = 2048
    """Channels of the text encoder's features."""
    text_length: Count = 512
    """The most rows of a text."""
    text_encoder: str = ""
    """What made the features that it was trained on, see `load_text_encoder`; empty if nobody has said."""
    pool_heads: Count = 16
    """Heads of the attention that pools a text to one row."""
    gate_init: Number = 0.0
    """Where the residual gates start, see `VARConfig.gate_init`."""
    norm_eps: NotNegative = 1e-6
    condition_dropout: Share = 0.1
    """Share of training samples whose text is replaced by learned rows that say nothing, for guidance."""
    subject: Annotated[str, OneOf(*SUBJECTS)] = "none"
    """Prefix of a reference subject, see `VARConfig.subject`."""
    subject_own_tokens: bool = False
    """What its tokens are, see `VARConfig.subject_own_tokens`."""
    subject_dropout: Share = 0.1
    """Share of training groups whose subject is dropped, see `VARConfig.subject_dropout`."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block, growing linearly over the blocks."""

    shared_adaln: ClassVar[bool] = True  # what `var_block.Block` asks of a config
    qk_l2_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)
        check_fields(self)
        for name, heads in (("num_heads", self.num_heads), ("pool_heads", self.pool_heads)):
            if self.embed_dim % heads:
                raise ValueError(
                    f"InfinityConfig: {name}: expected a divisor of embed_dim {self.embed_dim}, got {heads}"
                )
        if self.head_dim % 4:
            raise ValueError(
                f"InfinityConfig: num_heads: expected heads of a multiple of 4 channels, got {self.head_dim}"
            )
        self.check_schedule(self.schedule)

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def code_channels(self) -> int:
        """Channels of a token's input: one for each bit."""
        return self.bits

    def check_schedule(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """The schedule itself.

        Raises:
            ValueError: its first grid has several tokens, or it has more scales than the model has embeddings for.
        """
        if schedule.lengths[0] != 1:
            raise ValueError(f"Infinity: grids: expected 1 token first, got {schedule.lengths[0]}")
        if len(schedule) > self.max_scales:
            raise ValueError(f"Infinity: grids: expected at most {self.max_scales} scales, got {len(schedule)}")
        return schedule

    @classmethod
    def named(cls, name: str, **fields: Any) -> InfinityConfig:
        """The config of a registered size: "layer12" to "layer48", "2b", "8b" or "20b".

        Args:
            name: as the public code registers it, without "infinity_".
            fields: other fields, such as grids.

        Raises:
            ValueError: another name.
        """
        if name not in NAMED:
            raise ValueError(f"InfinityConfig.named: name: expected one of {tuple(NAMED)}, got {name!r}")
        depth, width, heads = NAMED[name]
        shape: dict[str, Any] = {"depth": depth, "embed_dim": width, "num_heads": heads, "drop_path": 0.1}
        shape["mlp_ratio"] = round(4 * width / 256) * 256 / width
        shape["pool_heads"] = 32 if width > 4096 else 16  # for 2048 channels of text
        shape["bits"] = 56 if name == "8b" else 32
        return cls(**{**shape, **fields})


# name: depth, width, heads (FoundationVision/Infinity; the 8B's as its inference script builds it)
NAMED = {
    "layer12": (12, 768, 8),
    "layer16": (16, 1152, 12),
    "layer24": (24, 1536, 16),
    "layer32": (32, 2080, 20),
    "layer40": (40, 2688, 24),
    "layer48": (48, 3360, 28),
    "2b": (32, 2048, 16),
    "8b": (40, 3584, 28),
    "20b": (58, 4608, 36),
}
