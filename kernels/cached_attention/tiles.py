"""Tile sizes of attention to a cache: BLOCK_M queries and BLOCK_N keys at a time, by the queries of one sample."""

from __future__ import annotations

from fastvar.kernels.common.tiling import Key, Row, Table, Tile


def _tile(block_m: int, block_n: int, warps: int, stages: int) -> Tile:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _bytes(tile: Tile, key: Key) -> int:
    """The queries, and keys and values on their way."""
    width = max(16, 1 << (key["head_dim"] - 1).bit_length())
    return (tile["BLOCK_M"] + 2 * tile["BLOCK_N"] * tile["num_stages"]) * width * key["bits"] // 8


def _half(head_dim: int, **most: int) -> dict[str, int]:
    return {"bits": 16, "head_dim": head_dim, **most}


# Not swept. Of many queries the tiles are those that won in block-causal attention.
PART = Table(
    "cached_attention.part",
    (
        Row(_tile(16, 64, 4, 3), most=_half(128, queries=16)),
        Row(_tile(32, 64, 4, 3), most=_half(64, queries=32)),
        Row(_tile(32, 64, 4, 2), most=_half(128, queries=32)),
        Row(_tile(64, 64, 4, 3), most=_half(64)),
        Row(_tile(128, 64, 8, 3), most=_half(128)),
        Row(_tile(64, 64, 4, 2), most=_half(128)),
        Row(_tile(16, 32, 4, 1), most={"head_dim": 128, "queries": 16}),
        Row(_tile(32, 32, 4, 1), most={"head_dim": 64}),
        Row(_tile(32, 32, 8, 1), most={"head_dim": 256}),
        Row(_tile(16, 16, 4, 1)),
    ),
    shared=_bytes,
    candidates={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
)
