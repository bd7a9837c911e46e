"""Tile sizes of block-causal attention: BLOCK_M queries and BLOCK_N keys at a time.

A measured row holds for its head dimension and smaller ones, and for all lengths up to its bound. DESCRIPTORS: keys and
values that nothing masks come by the tensor memory accelerator, where their strides let them.
"""

from __future__ import annotations

from fastvar.kernels.common.tiling import Key, Row, Table, Tile

H200 = "sweep, H200, 2026-11-27"
CANDIDATES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}


def _tile(block_m: int, block_n: int, warps: int, stages: int, **more: int) -> Tile:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, **more}


def _bytes(held: int, moving: int, tile: Tile, key: Key) -> int:
    """Of so many rows that stay or are turned, and as many of those on their way as there are stages."""
    width = max(16, 1 << (key["head_dim"] - 1).bit_length())
    return (held + moving * tile["num_stages"]) * width * key["bits"] // 8


def _small(**more: int) -> tuple[Row, ...]:
    """Float32, where one product is three, and head dimensions above 128."""
    return (
        Row(_tile(32, 32, 4, 1, **more), most={"head_dim": 64}),
        Row(_tile(32, 32, 8, 1, **more), most={"head_dim": 256}),
        Row(_tile(16, 16, 4, 1, **more)),
    )


def _half(head_dim: int, length: int | None = None) -> dict[str, int]:
    return {"bits": 16, "head_dim": head_dim} | ({} if length is None else {"length": length})


FORWARD = Table(
    "block_causal_attention.forward",
    (
        Row(_tile(64, 64, 4, 3, DESCRIPTORS=0), "sm90", _half(64), H200),
        Row(_tile(64, 64, 4, 3, DESCRIPTORS=1), "sm90", _half(128, 2048)),  # more programs where rows are few
        Row(_tile(128, 128, 8, 3, DESCRIPTORS=1), "sm90", _half(128), H200),
        Row(_tile(128, 64, 4, 3, DESCRIPTORS=0), "sm100", _half(64)),  # its matrix units take 128 rows
        Row(_tile(64, 64, 4, 3, DESCRIPTORS=0), most=_half(64)),
        Row(_tile(128, 64, 8, 3, DESCRIPTORS=0), most=_half(128)),
        Row(_tile(64, 64, 4, 2, DESCRIPTORS=0), most=_half(128)),
        *_small(DESCRIPTORS=0),
    ),
    shared=lambda tile, key: _bytes(tile["BLOCK_M"], 2 * tile["BLOCK_N"], tile, key),
    candidates={**CANDIDATES, "DESCRIPTORS": (0, 1)},
)
BACKWARD_Q = Table(
    "block_causal_attention.backward_q",
    (
        Row(_tile(64, 64, 4, 3), "sm90", _half(64), H200),
        Row(_tile(64, 64, 4, 2), "sm90", _half(128), H200),
        Row(_tile(64, 64, 4, 2), most=_half(64)),
        Row(_tile(64, 64, 8, 1), most=_half(128)),
        *_small(),
    ),
    shared=lambda tile, key: _bytes(2 * tile["BLOCK_M"] + tile["BLOCK_N"], 2 * tile["BLOCK_N"], tile, key),
    candidates=CANDIDATES,
)


def _keys(name: str) -> Table:
    """A tile of keys and values stays, rows of queries and gradients pass."""
    return Table(
        name,
        (
            Row(_tile(32, 128, 4, 3), "sm90", _half(64), H200),
            Row(_tile(64, 64, 4, 1), "sm90", _half(128), H200),
            Row(_tile(64, 64, 4, 2), most=_half(64)),
            Row(_tile(64, 64, 8, 1), most=_half(128)),
            *_small(),
        ),
        shared=lambda tile, key: _bytes(2 * tile["BLOCK_N"] + 2 * tile["BLOCK_M"], 2 * tile["BLOCK_M"], tile, key),
        candidates=CANDIDATES,
    )


BACKWARD_KV = _keys("block_causal_attention.backward_kv")
BACKWARD_PREFIX = _keys("block_causal_attention.backward_prefix")
