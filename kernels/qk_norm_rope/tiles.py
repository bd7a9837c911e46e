"""Tiles of qk_norm_rope's kernels: ROWS heads of tokens, all channels of each, a program.

A thread of four warps holds 16 elements of a tensor: two loads of 16 bytes in 16-bit types. That is enough to keep the
memory busy and leaves registers for many programs on a multiprocessor. Rows of a head dimension are padded to a power
of two, which is what `head_dim` counts here.
"""

from fastvar.kernels.common.tiling import Row, Table

_ROWS = [Row({"ROWS": 2048 // size, "num_warps": 4}, most={"head_dim": size}) for size in (32, 64, 128, 256, 512, 1024)]
_LONG = Row({"ROWS": 1, "num_warps": 8})
_CANDIDATES = {"ROWS": (8, 16, 32, 64, 128), "num_warps": (2, 4, 8)}

FORWARD = Table("qk_norm_rope.forward", [*_ROWS, _LONG], candidates=_CANDIDATES)
BACKWARD = Table("qk_norm_rope.backward", [*_ROWS, _LONG], candidates=_CANDIDATES)
