"""Normalisation, scale and rotation of queries and keys in one pass in Triton, also straight into a cache.

A program takes some rows, each one head of one token, as two halves: the even and the odd elements, which are the pairs
that rotate. Lengths are computed anew in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MAX_LOG_SCALE = tl.constexpr(math.log(100.0))
ROWS = 32


@triton.jit
def _row(H: tl.constexpr, L, ROWS: tl.constexpr):
    """Of this program's rows [ROWS, 1]: token, head, and which exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return row // H, row % H, row < L * H


@triton.jit
def _pairs(ptr, offset, stride, valid, D: tl.constexpr, HALF: tl.constexpr):
    """Even and odd elements [ROWS, HALF] in float32; 0 where there is none."""
    pair = 2 * tl.arange(0, HALF)[None, :]
    even = tl.load(ptr + offset + pair * stride, valid & (pair < D), 0.0)
    odd = tl.load(ptr + offset + (pair + 1) * stride, valid & (pair + 1 < D), 0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _store_pairs(ptr, offset, stride, even, odd, valid, D: tl.constexpr, HALF: tl.constexpr):
    pair = 2 * tl.arange(0, HALF)[None, :]
    tl.store(ptr + offset + pair * stride, even, valid & (pair < D))
    tl.store(ptr + offset + (pair + 1) * stride, odd, valid & (pair + 1 < D))


@triton.jit
def _angles(cos_ptr, sin_ptr, token, valid, cos_l, cos_d, sin_l, sin_d, D: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [ROWS, HALF]."""
    pair = tl.arange(0, HALF)[None, :]
    seen = valid & (pair < D // 2)
    cos = tl.load(cos_ptr + token * cos_l + pair * cos_d, seen, 1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_l + pair * sin_d, seen, 0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _gain(log_scale_ptr, head):
    """exp(min(log_scale, log 100)) [ROWS, 1]."""
    return tl.exp(tl.minimum(tl.load(log_scale_ptr + head).to(tl.float32), MAX_LOG_SCALE))


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, log_scale_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d,
    k_out_b, k_out_l, k_out_h, k_out_d, v_out_b, v_out_l, v_out_h, v_out_d,
    cos_l, cos_d, sin_l, sin_d, L, position, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    token, head, valid = _row(H, L, ROWS)
    token = token.to(tl.int64)
    q_even, q_odd = _pairs(q_ptr, b * q_b + token * q_l + head * q_h, q_d, valid, D, HALF)
    k_even, k_odd = _pairs(k_ptr, b * k_b + token * k_l + head * k_h, k_d, valid, D, HALF)
    if NORM:
        length = tl.sqrt(tl.sum(q_even * q_even + q_odd * q_odd, 1)[:, None])
        factor = _gain(log_scale_ptr, head) / tl.maximum(length, eps)
        q_even, q_odd = q_even * factor, q_odd * factor
        length = tl.sqrt(tl.sum(k_even * k_even + k_odd * k_odd, 1)[:, None])
        factor = 1 / tl.maximum(length, eps)
        k_even, k_odd = k_even * factor, k_odd * factor
    if ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, token, valid, cos_l, cos_d, sin_l, sin_d, D, HALF)
        q_even, q_odd = q_even * cos - q_odd * sin, q_even * sin + q_odd * cos
        k_even, k_odd = k_even * cos - k_odd * sin, k_even * sin + k_odd * cos
    _store_pairs(q_out_ptr, ((b * L + token) * H + head) * D, 1, q_even, q_odd, valid, D, HALF)
    place = b * k_out_b + (position + token) * k_out_l + head * k_out_h
    _store_pairs(k_out_ptr, place, k_out_d, k_even, k_odd, valid, D, HALF)
    if VALUES:
        v_even, v_odd = _pairs(v_ptr, b * v_b + token * v_l + head * v_h, v_d, valid, D, HALF)
        place = b * v_out_b + (position + token) * v_out_l + head * v_out_h
        _store_pairs(v_out_ptr, place, v_out_d, v_even, v_odd, valid, D, HALF)


@triton.jit
def _backward(
    g_ptr, x_ptr, log_scale_ptr, cos_ptr, sin_ptr, dx_ptr, dlog_scale_ptr,
    g_b, g_l, g_h, g_d, x_b, x_l, x_h, x_d, cos_l, cos_d, sin_l, sin_d, L, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, SCALED: tl.constexpr, DX: tl.constexpr, DLOG_SCALE: tl.constexpr,
):  # fmt: skip
    """Of the queries (SCALED) or the keys; what dlog_scale gets for a row goes to its place in (B, L, H)."""
    b = tl.program_id(1).to(tl.int64)
    token, head, valid = _row(H, L, ROWS)
    token = token.to(tl.int64)
    even, odd = _pairs(g_ptr, b * g_b + token * g_l + head * g_h, g_d, valid, D, HALF)
    if ROPE:  # turned back
        cos, sin = _angles(cos_ptr, sin_ptr, token, valid, cos_l, cos_d, sin_l, sin_d, D, HALF)
        even, odd = even * cos + odd * sin, odd * cos - even * sin
    row = (b * L + token) * H + head
    if NORM:
        x_even, x_odd = _pairs(x_ptr, b * x_b + token * x_l + head * x_h, x_d, valid, D, HALF)
        length = tl.sqrt(tl.sum(x_even * x_even + x_odd * x_odd, 1)[:, None])
        factor = 1 / tl.maximum(length, eps)
        x_even, x_odd = x_even * factor, x_odd * factor
        along = tl.sum(even * x_even + odd * x_odd, 1)[:, None]
        if SCALED:
            gain = _gain(log_scale_ptr, head)
            if DLOG_SCALE:
                # float32 has no log 100, and rounds it up
                below = tl.load(log_scale_ptr + head).to(tl.float32) < MAX_LOG_SCALE
                tl.store(dlog_scale_ptr + row, tl.where(below, along * gain, 0.0), valid)
            factor = factor * gain
        along = tl.where(length >= eps, along, 0.0)  # a shorter one is divided by a constant
        even, odd = (even - x_even * along) * factor, (odd - x_odd * along) * factor
    if DX:
        _store_pairs(dx_ptr, row * D, 1, even, odd, valid, D, HALF)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return _launch(q, k, None, k_out, None, 0, log_scale, rope_cos, rope_sin, eps), k_out


def into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: int,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """See the reference."""
    return _launch(q, k, v, key_cache, value_cache, position, log_scale, rope_cos, rope_sin, eps)


def backward(
    grads: Sequence[torch.Tensor | None],
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of q, k and log_scale, as far as they are needed; the rotary tables have none."""
    batch, length, heads, _ = q.shape
    log_scale = None if log_scale is None else log_scale.contiguous()
    found: list[torch.Tensor] = []
    dlog_scale = torch.zeros(batch, length, heads if needs[2] else 0, dtype=torch.float32, device=q.device)
    for x, grad, need, scaled in ((q, grads[0], needs[0], True), (k, grads[1], needs[1], False)):
        make = torch.zeros if grad is None else torch.empty
        dx = make(x.shape if need else 0, dtype=x.dtype, device=x.device)
        wants_scale = scaled and needs[2]
        if grad is not None and x.numel() and (need or wants_scale):
            tables = _tables(rope_cos, rope_sin)
            _backward[_grid(q)](
                grad, x, log_scale, rope_cos, rope_sin, dx, dlog_scale, *grad.stride(), *x.stride(), *tables,
                length, eps, **options(*q.shape[2:]), NORM=log_scale is not None, ROPE=rope_cos is not None,
                SCALED=scaled, DX=need, DLOG_SCALE=wants_scale,
            )  # fmt: skip
        if need:
            found.append(dx)
    if needs[2]:
        assert log_scale is not None
        found.append(dlog_scale.sum((0, 1)).to(log_scale.dtype))
    return found


def options(heads: int, head_dim: int) -> dict[str, int]:
    """The kernels' constants."""
    half = triton.next_power_of_2((head_dim + 1) // 2)
    return {"H": heads, "D": head_dim, "HALF": half, "ROWS": max(1, min(ROWS, 2048 // half)), "num_warps": 4}


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    position: int,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_scale = None if log_scale is None else log_scale.contiguous()
    if q.numel():
        strides = [(0, 0, 0, 0) if t is None else t.stride() for t in (q, k, v, k_out, v_out)]
        _forward[_grid(q)](
            q, k, v, log_scale, rope_cos, rope_sin, q_out, k_out, v_out, *(s for stride in strides for s in stride),
            *_tables(rope_cos, rope_sin), q.shape[1], position, eps, **options(*q.shape[2:]),
            NORM=log_scale is not None, ROPE=rope_cos is not None, VALUES=v is not None,
        )  # fmt: skip
    return q_out


def _grid(q: torch.Tensor) -> tuple[int, int]:
    batch, length, heads, head_dim = q.shape
    return triton.cdiv(length * heads, options(heads, head_dim)["ROWS"]), batch


def _tables(cos: torch.Tensor | None, sin: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of the rotary tables."""
    return (0, 0, 0, 0) if cos is None or sin is None else (*cos.stride(), *sin.stride())
