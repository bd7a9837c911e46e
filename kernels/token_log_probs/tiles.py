"""Tile sizes of the kernels over logits. They depend on the vocabulary alone, never on the number of rows: a token's
log-probability must not."""

from __future__ import annotations

from fastvar.kernels.common.tiling import Row, Table

# A program holds ELEMENTS logits, of one row or of several short ones: 32 a thread at most, so that a second tile, the
# reference's, has room in the registers too. Longer rows are read in parts, twice, 16 a thread.
# Shared memory is needed for sums between warps alone.
LOGITS = Table(
    "token_log_probs.logits",
    [
        Row({"ELEMENTS": 4096, "num_warps": 4}, most={"size": 4096}),
        Row({"ELEMENTS": 8192, "num_warps": 8}, most={"size": 8192}),
        Row({"ELEMENTS": 16384, "num_warps": 16}, most={"size": 16384}),
        Row({"ELEMENTS": 4096, "num_warps": 8}),
    ],
    candidates={"ELEMENTS": (4096, 8192, 16384), "num_warps": (4, 8, 16)},
)
