"""Tile sizes of group norm: elements that a program holds at a time."""

from __future__ import annotations

from fastvar.kernels.common.tiling import Row, Table

TILE = Table(
    "group_norm_silu",
    [Row({"TILE": 4096, "num_warps": 4})],
    candidates={"TILE": (2048, 4096, 8192), "num_warps": (4, 8)},
)
