"""Tiles of the samplers. Of tokens a program holds a whole row of `vocabulary` logits (padded to a power of two) in
registers, 32 a thread, so that few are left beside the logits and their weights; WIDTH logits are a block of the
cumulative sum. Of bits it takes TILE."""

from fastvar.kernels.common.tiling import Row, Table

TOKENS = Table(
    "sample_tokens.tokens",
    [
        *(Row({"WIDTH": 128, "num_warps": warps}, most={"vocabulary": 1024 * warps}) for warps in (1, 2, 4, 8)),
        Row({"WIDTH": 128, "num_warps": 16}),
    ],
    candidates={"WIDTH": (128,), "num_warps": (1, 2, 4, 8, 16)},
)
BITS = Table("sample_tokens.bits", [Row({"TILE": 1024, "num_warps": 4})])
