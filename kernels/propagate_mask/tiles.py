"""Tiles of propagate_mask: TOKENS of a program, and how many cells of their footprints it adds up at a time, where
footprints are small (FEW) and where they are not (MANY)."""

from fastvar.kernels.common.tiling import Row, Table

PROPAGATE = Table("propagate_mask.propagate", [Row({"TOKENS": 8, "FEW": 16, "MANY": 128, "num_warps": 4})])
