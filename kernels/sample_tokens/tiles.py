"""Tiles of the samplers. Of tokens a program holds a whole row of `vocabulary` logits (padded to a power of two) in
registers, 32 a thread up to 16,384, so that few are left beside the logits and their weights; WIDTH logits are a block
of the cumulative sum. Steps of the search wait for one another, so a multiprocessor needs many rows at a time: with at
most 96 registers a thread it holds five of 4,096 logits, with 125, which the compiler would take, four. Of longer rows
it holds as many with 128. Of bits a program takes TILE."""

from fastvar.kernels.common.tiling import Row, Table

TOKENS = Table(
    "sample_tokens.tokens",
    [
        *(
            Row({"WIDTH": 128, "num_warps": warps, "maxnreg": most}, most={"vocabulary": 1024 * warps})
            for warps, most in ((1, 96), (2, 96), (4, 96), (8, 128))
        ),
        Row({"WIDTH": 128, "num_warps": 16, "maxnreg": 128}),
    ],
    candidates={"WIDTH": (128,), "num_warps": (1, 2, 4, 8, 16), "maxnreg": (64, 80, 96, 128)},
)
BITS = Table("sample_tokens.bits", [Row({"TILE": 1024, "num_warps": 4})])
