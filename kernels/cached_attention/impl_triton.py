"""Attention of new queries to prefix, trunk and a sample's own keys in Triton.

Each of the three parts is a matrix of keys that some samples share: their queries are rows of one tile, so that what is
shared is read once for all of them. Where queries are few, the keys of a part are divided among several programs. What
comes of a part is merged by log-sum-exp, always in the same order. How keys are divided depends on the number of keys
and of queries of one sample alone, hence no result depends on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.tiles import LOG2_E, attend

FEW = 64  # queries of a sample; from there on, tiles of queries alone keep a GPU busy
SPLIT = 512  # keys of a program where queries are few
MERGED = 8  # rows that a program of the merge takes


@triton.jit
def _part(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d, rows, n, KEYS, H, split, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARE: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of SHARE samples to `split` keys that they share; results of row (b, h, i) of this division
    go to place ((division * B + b) * n + i) * H + h."""
    s, h = (tl.program_id(2) // H).to(tl.int64), (tl.program_id(2) % H).to(tl.int64)
    division = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # of SHARE samples, n tokens each
    b, token = s * SHARE + row // n, row % n
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = row < SHARE * n
    place = b[:, None] * q_b + token[:, None] * q_l + h * q_h + d * q_d
    q = tl.load(q_ptr + place, inside[:, None] & (d < D), 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    seen = KEYS
    if LENGTHS:
        seen = tl.load(lengths_ptr + s).to(tl.int32)
    begin = tl.minimum(division * split, seen)
    end = tl.minimum(begin + split, seen)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    k_ptr += s * k_b + h * k_h
    v_ptr += s * v_b + h * v_h
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, begin, whole, row, row, factor,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, whole, end, row * 0, row * 0 + end, factor,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    empty = total == 0  # a prefix of length 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), peak + tl.log2(total))
    line = (division.to(tl.int64) * rows + b) * n * H + token * H + h
    tl.store(out_ptr + line[:, None] * D + d, acc, inside[:, None] & (d < D))
    tl.store(lse_ptr + line, lse, inside)


@triton.jit
def _merge(
    parts_ptr, lse_ptr, out_ptr, lines, COUNT,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The mean of COUNT parts, weighted with their softmaxes' sums, one after the other."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = line < lines
    d = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(COUNT):
        lse = tl.load(lse_ptr + part * lines + line, inside, 0.0)
        values = tl.load(parts_ptr + (part * lines + line)[:, None] * D + d, inside[:, None] & (d < D), 0.0)
        highest = tl.maximum(peak, lse)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight, decay = tl.exp2(lse - base), tl.exp2(peak - base)
        acc = acc * decay[:, None] + values * weight[:, None]
        total = total * decay + weight
        peak = highest
    tl.store(out_ptr + line[:, None] * D + d, acc / total[:, None], inside[:, None] & (d < D))


class _Part(NamedTuple):
    """Keys and values (B / share, N, H, D), and how many keys a program takes."""

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None
    split: int

    @property
    def divisions(self) -> int:
        return max(triton.cdiv(self.k.shape[1], self.split), 1)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    trunk_k: torch.Tensor | None,
    trunk_v: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """See the reference."""
    batch, n, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    given = ((prefix_k, prefix_v, prefix_lengths), (trunk_k, trunk_v, None), (k, v, None))
    parts = [
        _Part(keys, values, lengths, SPLIT if n < FEW else max(keys.shape[1], 1))
        for keys, values, lengths in given
        if keys is not None and values is not None and keys.shape[1]
    ]
    if not parts:
        return out.zero_()
    count = sum(part.divisions for part in parts)
    found, merged = out, torch.empty(0, dtype=torch.float32, device=q.device)
    if count > 1:
        found = merged = torch.empty(count, *q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(count, batch, n, heads, dtype=torch.float32, device=q.device)
    first = 0
    for part in parts:
        share = batch // part.k.shape[0]
        options = tile_options(head_dim, q.dtype, share * n)
        target, sums = (found, lse) if count == 1 else (found[first:], lse[first:])
        _part[(triton.cdiv(share * n, options["BLOCK_M"]), part.divisions, part.k.shape[0] * heads)](
            q, part.k, part.v, part.lengths, target, sums, *q.stride(), *part.k.stride(), *part.v.stride(),
            batch, n, part.k.shape[1], heads, part.split, softmax_scale * LOG2_E.value,
            SHARE=share, LENGTHS=part.lengths is not None, **options,
        )  # fmt: skip
        first += part.divisions
    if count > 1:
        lines = batch * n * heads
        _merge[(triton.cdiv(lines, MERGED),)](
            merged, lse, out, lines, count, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ROWS=MERGED,
            num_warps=4,
        )  # fmt: skip
    return out


def tile_options(head_dim: int, dtype: torch.dtype, rows: int) -> dict[str, int | str]:
    """Tile sizes, warps and stages for tiles of so many queries."""
    block = max(16, triton.next_power_of_2(head_dim))
    tall = min(max(16, triton.next_power_of_2(rows)), 128 if dtype != torch.float32 else 32)
    return {
        "D": head_dim,
        "BLOCK_D": block,
        "BLOCK_M": tall,
        "BLOCK_N": 64 if dtype != torch.float32 else 32,
        "PRECISION": "tf32x3",  # of float32
        "num_warps": 8 if block > 64 and tall > 32 else 4,
        "num_stages": 2,
    }
