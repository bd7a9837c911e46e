"""The models whose shapes are measured, by name. Suites take their sizes from here."""

from __future__ import annotations

from dataclasses import dataclass

from fastvar.schedule import ScaleSchedule


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer and its tokenizer.

    Attributes:
        grids: the schedule, as `ScaleSchedule.parse` takes it.
        depth: blocks.
        width: of the residual stream.
        heads: their dimension is width / heads.
        vocab_size: entries of the codebook; 0 for tokens of bits.
        channels: of the latent; the bits of a token where vocab_size is 0.
    """

    grids: str
    depth: int
    width: int
    heads: int
    vocab_size: int
    channels: int

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.grids)

    @property
    def tokens(self) -> int:
        return self.schedule.num_tokens

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


MODELS = {
    # for checks that take no time, and for CPUs: the demo's grids
    "tiny": ModelShape("1,2,3x4", 2, 32, 2, 64, 8),
    "demo": ModelShape("1,2,3x4,6x8", 4, 128, 4, 256, 16),
    # for CPUs: four of VAR's heads
    "VAR-d4": ModelShape("var-256", 4, 256, 4, 4096, 32),
    "VAR-d4-512": ModelShape("var-512", 4, 256, 4, 4096, 32),
    # FoundationVision/VAR
    "VAR-d16": ModelShape("var-256", 16, 1024, 16, 4096, 32),
    "VAR-d30": ModelShape("var-256", 30, 1920, 30, 4096, 32),
    "VAR-d36-512": ModelShape("var-512", 36, 2304, 36, 4096, 32),
    # FoundationVision/Infinity
    "Infinity-tiny": ModelShape("infinity-0.06M-1.000", 2, 64, 2, 0, 8),
    "Infinity-2B-0.06M": ModelShape("infinity-0.06M-1.000", 32, 2048, 16, 0, 32),
    "Infinity-2B-0.25M": ModelShape("infinity-0.25M-1.000", 32, 2048, 16, 0, 32),
    "Infinity-2B": ModelShape("infinity-1M-1.000", 32, 2048, 16, 0, 32),
    "Infinity-8B": ModelShape("infinity-1M-1.000", 40, 3584, 28, 0, 56),
}
