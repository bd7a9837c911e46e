"""Normalisation, scale and rotation of queries and keys in one pass in Triton, also straight into a cache.

A program takes some rows of one image, each one head of one token, and loads them whole, 16 bytes a thread. Only a
rotation takes the pairs of a row apart, in registers. Lengths are computed anew in the backward pass, which makes the
gradients of queries and keys in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import Table, card, cdiv, power_of_2
from fastvar.kernels.qk_norm_rope import tiles

if TYPE_CHECKING:
    from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall

MAX_LOG_SCALE = tl.constexpr(math.log(100.0))
WIDEST = 8  # elements of a 16-bit type that a thread loads at once


@triton.jit
def _rows(L, H: tl.constexpr, ROWS: tl.constexpr):
    """Of this program's rows: their image, and [ROWS] token, head, place among all rows, and which exist."""
    count = L * H
    parts = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // parts).to(tl.int64)
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    return image, (row // H).to(tl.int64), (row % H).to(tl.int64), image * count + row, row < count


@triton.jit
def _place(image, token, head, stride_b, stride_l, stride_h, ALIGNED: tl.constexpr):
    """Where rows begin [ROWS]: at multiples of ALIGNED elements, as the strides are."""
    return tl.multiple_of(image * stride_b + token * stride_l + head * stride_h, ALIGNED)


@triton.jit
def _load(ptr, place, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, BLOCK_D]; 0 where there is nothing."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + place[:, None] + d, valid[:, None] & (d < D), 0.0)


@triton.jit
def _store(ptr, place, x, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + place[:, None] + d, x, valid[:, None] & (d < D))


@triton.jit
def _angles(cos_ptr, sin_ptr, token, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin [ROWS, BLOCK_D / 2] from contiguous tables."""
    cos = _load(cos_ptr, token * (D // 2), valid, D // 2, BLOCK_D // 2).to(tl.float32)
    return cos, _load(sin_ptr, token * (D // 2), valid, D // 2, BLOCK_D // 2).to(tl.float32)


@triton.jit
def _rotated(x, cos, sin):
    """Rows [ROWS, BLOCK_D] whose pairs (x_2i, x_2i+1) are turned."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def _gain(log_scale_ptr, head):
    """exp(min(log_scale, log 100)) [ROWS], and where it has a gradient: float32 has no log 100, and rounds it up."""
    log_scale = tl.load(log_scale_ptr + head).to(tl.float32)
    return tl.exp(tl.minimum(log_scale, MAX_LOG_SCALE)), log_scale < MAX_LOG_SCALE


@triton.jit
def _length(x):
    """[ROWS]."""
    return tl.sqrt(tl.sum(x * x, 1))


@kernel(do_not_specialize=["L", "position"])
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, v_ptr, log_scale_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, k_out_b, k_out_l, k_out_h, v_out_b, v_out_l, v_out_h,
    L, position, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    image, token, head, row, valid = _rows(L, H, ROWS)
    q = _load(q_ptr, _place(image, token, head, q_b, q_l, q_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
    k = _load(k_ptr, _place(image, token, head, k_b, k_l, k_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
    if VALUES:
        v = _load(v_ptr, _place(image, token, head, v_b, v_l, v_h, ALIGNED), valid, D, BLOCK_D)
        place = _place(image, position + token, head, v_out_b, v_out_l, v_out_h, ALIGNED)
        _store(v_out_ptr, place, v, valid, D, BLOCK_D)
    if NORM:
        gain, _ = _gain(log_scale_ptr, head)
        q *= (gain / tl.maximum(_length(q), eps))[:, None]
        k *= (1 / tl.maximum(_length(k), eps))[:, None]
    if ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, token, valid, D, BLOCK_D)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    _store(q_out_ptr, row * D, q, valid, D, BLOCK_D)
    place = _place(image, position + token, head, k_out_b, k_out_l, k_out_h, ALIGNED)
    _store(k_out_ptr, place, k, valid, D, BLOCK_D)


@triton.jit
def _slope(g, x, gain, eps):
    """The gradient [ROWS, BLOCK_D] of rows x that were normalised and multiplied by `gain`, and the part of g along
    them [ROWS]."""
    length = _length(x)
    factor = 1 / tl.maximum(length, eps)
    x *= factor[:, None]
    along = tl.sum(g * x, 1)
    shared = tl.where(length >= eps, along, 0.0)  # a row shorter than eps was divided by a constant
    return (g - x * shared[:, None]) * (factor * gain)[:, None], along


@kernel(do_not_specialize=["L"])
def qk_norm_rope_bwd_kernel(
    gq_ptr, gk_ptr, q_ptr, k_ptr, log_scale_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dlog_scale_ptr,
    gq_b, gq_l, gq_h, gk_b, gk_l, gk_h, q_b, q_l, q_h, k_b, k_l, k_h, L, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DLOG_SCALE: tl.constexpr,
):  # fmt: skip
    """What dlog_scale gets for a row goes to its place in (B, L, H): at most a hundredth of what is moved."""
    image, token, head, row, valid = _rows(L, H, ROWS)
    if ROPE:  # back
        cos, sin = _angles(cos_ptr, sin_ptr, token, valid, D, BLOCK_D)
        sin = -sin
    if DQ or DLOG_SCALE:
        g = _load(gq_ptr, _place(image, token, head, gq_b, gq_l, gq_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
        if ROPE:
            g = _rotated(g, cos, sin)
        if NORM:
            q = _load(q_ptr, _place(image, token, head, q_b, q_l, q_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
            gain, below = _gain(log_scale_ptr, head)
            g, along = _slope(g, q, gain, eps)
            if DLOG_SCALE:
                tl.store(dlog_scale_ptr + row, tl.where(below, along * gain, 0.0), valid)
        if DQ:
            _store(dq_ptr, row * D, g, valid, D, BLOCK_D)
    if DK:
        g = _load(gk_ptr, _place(image, token, head, gk_b, gk_l, gk_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
        if ROPE:
            g = _rotated(g, cos, sin)
        if NORM:
            k = _load(k_ptr, _place(image, token, head, k_b, k_l, k_h, ALIGNED), valid, D, BLOCK_D).to(tl.float32)
            g, _ = _slope(g, k, 1.0, eps)
        _store(dk_ptr, row * D, g, valid, D, BLOCK_D)


def forward(call: QKNormRopeCall | IntoCacheCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    k_out = torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device)
    return _launch(call, None, k_out, None, 0), k_out


def into_cache(call: IntoCacheCall) -> torch.Tensor:
    """See the reference."""
    if call.key_cache.stride(-1) == call.value_cache.stride(-1) == 1:
        return _launch(call, call.v, call.key_cache, call.value_cache, call.position)
    q, k = forward(call)
    call.key_cache.narrow(1, call.position, k.shape[1]).copy_(k)
    call.value_cache.narrow(1, call.position, k.shape[1]).copy_(call.v)
    return q


def backward(
    call: QKNormRopeCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of q, k and log_scale, as far as they are needed; the rotary tables have none."""
    q, k, (grad_q, grad_k) = call.q, call.k, grads
    wanted = [needs.q and grad_q is not None, needs.k and grad_k is not None, needs.log_scale and grad_q is not None]
    shapes = [q.shape, k.shape, q.shape[:3]]
    dtypes = [q.dtype, k.dtype, torch.float32]
    dq, dk, dlog_scale = (
        (torch.empty if made else torch.zeros)(shape if need else 0, dtype=dtype, device=q.device)
        for shape, dtype, need, made in zip(shapes, dtypes, (needs.q, needs.k, needs.log_scale), wanted, strict=True)
    )
    if q.numel() and any(wanted):
        grad_q, grad_k, q, k = (None if t is None else _rows_adjacent(t) for t in (grad_q, grad_k, q, k))
        constants, strides = options(call.q, tiles.BACKWARD), _strides(grad_q, grad_k, q, k)
        qk_norm_rope_bwd_kernel[_grid(call.q, constants["ROWS"])](
            grad_q, grad_k, q, k, *_parameters(call), dq, dk, dlog_scale,
            *strides, call.q.shape[1], call.eps, **constants, ALIGNED=_aligned(strides),
            NORM=call.log_scale is not None, ROPE=call.rope is not None,
            DQ=wanted[0], DK=wanted[1], DLOG_SCALE=wanted[2],
        )  # fmt: skip
    gradients = {"q": dq, "k": dk}
    if call.log_scale is not None and needs.log_scale:
        gradients["log_scale"] = dlog_scale.sum((0, 1)).to(call.log_scale.dtype)
    return gradients


def options(q: torch.Tensor, table: Table) -> dict[str, int]:
    """The kernels' constants."""
    block = max(power_of_2(q.shape[3]), 2)
    return {"H": q.shape[2], "D": q.shape[3], "BLOCK_D": block, **table.choose(card(q.device), head_dim=block)}


def _launch(
    call: QKNormRopeCall | IntoCacheCall,
    v: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    position: int,
) -> torch.Tensor:
    q_out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    if call.q.numel():
        q, k, v = _rows_adjacent(call.q), _rows_adjacent(call.k), None if v is None else _rows_adjacent(v)
        constants, strides = options(q, tiles.FORWARD), _strides(q, k, v, k_out, v_out)
        qk_norm_rope_fwd_kernel[_grid(q, constants["ROWS"])](
            q, k, v, *_parameters(call), q_out, k_out, v_out,
            *strides, q.shape[1], position, call.eps, **constants, ALIGNED=_aligned(strides),
            NORM=call.log_scale is not None, ROPE=call.rope is not None, VALUES=v is not None,
        )  # fmt: skip
    return q_out


def _grid(q: torch.Tensor, rows: int) -> tuple[int]:
    return (q.shape[0] * cdiv(q.shape[1] * q.shape[2], rows),)


def _rows_adjacent(t: torch.Tensor) -> torch.Tensor:
    """With the channels of a head adjacent: a copy where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _parameters(call: QKNormRopeCall | IntoCacheCall) -> list[torch.Tensor | None]:
    """The scale and the rotary tables, contiguous."""
    return [None if t is None else t.contiguous() for t in (call.log_scale, *(call.rope or (None, None)))]


def _strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    strides: list[int] = []
    for t in tensors:
        strides += (0, 0, 0) if t is None else t.stride()[:3]
    return tuple(strides)


def _aligned(strides: Sequence[int]) -> int:
    """The power of two, up to WIDEST, that divides all strides of rows: so many elements may be loaded at once."""
    return math.gcd(WIDEST, *strides)
