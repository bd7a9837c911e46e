"""Tiles of the kernels over rows of channels: ROWS rows of a sample, whole, a step.

`width` is the number of channels padded to a power of two. All forward kernels share one table and all backward kernels
another, so that operators fused and apart add in the same order. A thread holds 16 elements of a tensor, two loads of
16 bytes in 16-bit types: a row lies in few warps, and registers are left for many programs.

Forward a program takes one step. Backward it takes PART rows, whose sums over rows it keeps in registers. From three
STAGES on the next row is on its way while it works on one. With two it is asked for when the row before is done with,
whose place it takes, and waited for at once: on an H200 the norm's kernel took 56 % of the bandwidth so. Three are
derived from the compiled code, not measured.
"""

from fastvar.kernels.common.tiling import Key, Row, Table, Tile

_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _forward(width: int) -> dict[str, int]:
    warps = min(max(width // 256, 1), 16)
    return {"ROWS": max(512 * warps // width, 1), "num_warps": warps}


def _backward(width: int, stages: int) -> dict[str, int]:
    warps = min(max(width // 512, 1), 32)
    return {"ROWS": max(512 * warps // width, 1), "PART": 32, "STAGES": stages, "num_warps": warps}


def _on_their_way(tile: Tile, key: Key) -> int:
    """Bytes of rows of four tensors in float32."""
    return (tile["STAGES"] - 1) * tile["ROWS"] * key["width"] * 4 * 4


FORWARD = Table(
    "adaptive_layer_norm.forward",
    [*(Row(_forward(width), most={"width": width}) for width in _SIZES), Row({"ROWS": 1, "num_warps": 32})],
    candidates={"ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)},
)
BACKWARD = Table(
    "adaptive_layer_norm.backward",
    [
        *(Row(_backward(width, stages), most={"width": width}) for stages in (3, 2, 1) for width in _SIZES),
        Row(_backward(1 << 16, 1)),
    ],
    shared=_on_their_way,
    candidates={"ROWS": (1, 2), "PART": (16, 32, 48, 64, 128), "STAGES": (1, 2, 3), "num_warps": (1, 2, 4, 8)},
)
