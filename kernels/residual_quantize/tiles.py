"""Tiles of residual_quantize's kernels: ROWS rows and CODES codes of a program of the search, CELLS cells of a program
that resamples. All channels of each are in registers."""

from fastvar.kernels.common.tiling import Row, Table

SEARCH = Table(
    "residual_quantize.search",
    [
        Row({"ROWS": 16, "CODES": 128, "num_warps": 4}, most={"length": 16}),
        Row({"ROWS": 64, "CODES": 128, "num_warps": 8}),
    ],
    candidates={"ROWS": (16, 32, 64), "CODES": (64, 128, 256), "num_warps": (4, 8)},
)
# `cells` is how many a bin has at most: a program takes them in turns of CELLS.
MEANS = Table(
    "residual_quantize.means",
    [
        Row({"CELLS": 1, "num_warps": 1}, most={"cells": 1}),
        Row({"CELLS": 16, "num_warps": 1}, most={"cells": 16}),
        Row({"CELLS": 128, "num_warps": 4}),
    ],
    candidates={"CELLS": (1, 4, 16, 64, 128), "num_warps": (1, 2, 4)},
)
UPSAMPLED = Table(
    "residual_quantize.upsampled",
    [Row({"CELLS": 32, "num_warps": 4})],
    candidates={"CELLS": (16, 32, 64), "num_warps": (2, 4, 8)},
)
