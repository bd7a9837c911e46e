"""Tiles of matrices and of attention to them, for kernels in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(ptr, row, row_stride, d_stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a (., D) matrix [N, BLOCK_D]; 0 past D and, with CHECK, from row `limit` on."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + row[:, None] * row_stride + d * d_stride
    if CHECK:
        return tl.load(pointers, (row[:, None] < limit) & (d < D), 0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, d < D, 0.0)


@triton.jit
def tile_t(ptr, row, row_stride, d_stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """The same rows as columns [BLOCK_D, N]."""
    d = tl.arange(0, BLOCK_D)[:, None]
    pointers = ptr + row[None, :] * row_stride + d * d_stride
    if CHECK:
        return tl.load(pointers, (row[None, :] < limit) & (d < D), 0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, d < D, 0.0)


@triton.jit
def store(ptr, row, row_stride, values, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] into a matrix whose elements of a row are adjacent."""
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + row[:, None] * row_stride + d, values, (row[:, None] < limit) & (d < D))


@triton.jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, begin, end, first, last, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax so far, with the keys from `begin` to `end`; with MASK a row sees those from `first` to `last` [M]."""
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = tile_t(k_ptr, column, k_l, k_d, end, D, BLOCK_D, MASK)  # [BLOCK_D, N]
        scores = tl.dot(q, k, input_precision=PRECISION) * factor  # [M, N]
        if MASK:
            visible = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        base = highest
        if MASK:  # a row may have seen nothing yet
            base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        v = tile(v_ptr, column, v_l, v_d, end, D, BLOCK_D, MASK)  # [N, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = highest
    return acc, total, peak
