"""Tiles of matrices and of attention to them, for kernels in Triton.

A row's elements are adjacent. Offsets are 64 bits wide: a row may lie anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.tiling import power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


def rows_adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself or, where the elements of its last dimension are not adjacent, a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def common_factor(*tensors: torch.Tensor | None) -> int:
    """8 if that divides the strides of samples and heads (B, L, H, D), else 1: what `head` is told."""
    for t in tensors:
        if t is not None and (t.stride(0) % 8 or t.stride(2) % 8):
            return 1
    return 8


@triton.jit
def head(ptr, b, h, b_stride, h_stride, ALIGNED: tl.constexpr):
    """Where sample b's head h begins. The compiler finds out of itself only that a stride is a multiple of 16, which
    that of heads of 104 or 120 is not; without it loads are two bytes wide."""
    return ptr + tl.multiple_of(b * b_stride, ALIGNED) + tl.multiple_of(h * h_stride, ALIGNED)


@triton.jit
def tile(ptr, row, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a (., D) matrix [N, BLOCK_D]; 0 past D and, with CHECK, from row `limit` on."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + row[:, None].to(tl.int64) * stride + d
    if CHECK:
        return tl.load(pointers, (row[:, None] < limit) & (d < D), 0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, d < D, 0.0)


@triton.jit
def store(ptr, row, stride, values, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [N, BLOCK_D] before `limit` into a matrix (., D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + row[:, None].to(tl.int64) * stride + d, values, (row[:, None] < limit) & (d < D))


@triton.jit
def softmax_step(acc, total, peak, q, k, v, visible, factor, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax so far, with the keys k and values v [N, BLOCK_D] of one tile; `visible` [M, N] with MASK. The factor is
    not negative."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
    if MASK:
        scores = tl.where(visible, scores * factor, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row may have seen nothing yet
        p = tl.exp2(scores - base[:, None])
    else:
        highest = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = highest
        p = tl.exp2(scores * factor - base[:, None])  # one instruction before the exponential
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, highest


@triton.jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, begin, end, lower, upper, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax so far, with the keys from `begin` to `end`; with MASK those from `lower` to `upper`, each a number or
    [M, 1]."""
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = tile(k_ptr, column, k_l, end, D, BLOCK_D, MASK)
        v = tile(v_ptr, column, v_l, end, D, BLOCK_D, MASK)
        visible = (column[None, :] >= lower) & (column[None, :] < upper)
        acc, total, peak = softmax_step(acc, total, peak, q, k, v, visible, factor, MASK, PRECISION)
    return acc, total, peak


def constants(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What `tile` and the products are told. Three products in TF32 make one in float32: in full precision registers
    spill. For 16 bits the precision says nothing."""
    block = max(16, power_of_2(head_dim))
    return {"D": head_dim, "BLOCK_D": block, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
