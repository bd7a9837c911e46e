"""Adaptive layer norm and gated residual in Triton, forward and backward.

A program takes some rows of one sample, all channels of them at once. Statistics are computed anew in the backward
pass: the row is in registers anyway. Gradients of the modulations are sums over a sample's rows: each program writes
its part, and the parts are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TILE = 4096  # channels times rows that a program holds at a time
PARTS = 16  # of a sample's rows, for sums over them


@triton.jit
def _rows_of(start, size, L, SIZE: tl.constexpr):
    """Row indices [SIZE, 1] from start on and which of them lie before start + size and L."""
    row = start + tl.arange(0, SIZE)[:, None]
    return row, row < tl.minimum(start + size, L)


@triton.jit
def _normalised(x, seen, C: tl.constexpr, eps):
    """Rows [ROWS, BLOCK] to zero mean and unit variance, and 1 / deviation [ROWS, 1]; 0 where not seen."""
    mean = tl.sum(x, 1)[:, None] / C
    centred = tl.where(seen, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / C + eps)
    return centred * rstd, rstd


@triton.jit
def _norm_forward(
    x_ptr, scale_ptr, shift_ptr, y_ptr,
    x_b, x_l, x_c, scale_b, scale_c, shift_b, shift_c, L, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    row, valid = _rows_of(tl.program_id(0) * ROWS, ROWS, L, ROWS)
    seen = valid & (column < C)
    x = tl.load(x_ptr + b * x_b + row.to(tl.int64) * x_l + column * x_c, seen, 0.0).to(tl.float32)  # [ROWS, BLOCK]
    scale = tl.load(scale_ptr + b * scale_b + column * scale_c, column < C, 0.0).to(tl.float32)  # [1, BLOCK]
    shift = tl.load(shift_ptr + b * shift_b + column * shift_c, column < C, 0.0).to(tl.float32)
    normed, _ = _normalised(x, seen, C, eps)
    tl.store(y_ptr + (b * L + row) * C + column, normed * (1 + scale) + shift, seen)


@triton.jit
def _norm_backward(
    g_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr,
    g_b, g_l, g_c, x_b, x_l, x_c, scale_b, scale_c, L, size, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DX: tl.constexpr, DMODULATION: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    gain = 1 + tl.load(scale_ptr + b * scale_b + column * scale_c, column < C, 0.0).to(tl.float32)  # [1, BLOCK]
    dscale = tl.zeros((1, BLOCK), tl.float32)
    dshift = tl.zeros((1, BLOCK), tl.float32)
    for start in range(part * size, (part + 1) * size, ROWS):
        row, valid = _rows_of(start, (part + 1) * size - start, L, ROWS)
        seen = valid & (column < C)
        x = tl.load(x_ptr + b * x_b + row.to(tl.int64) * x_l + column * x_c, seen, 0.0).to(tl.float32)
        g = tl.load(g_ptr + b * g_b + row.to(tl.int64) * g_l + column * g_c, seen, 0.0).to(tl.float32)
        normed, rstd = _normalised(x, seen, C, eps)
        if DMODULATION:
            dscale += tl.sum(g * normed, 0)[None, :]
            dshift += tl.sum(g, 0)[None, :]
        if DX:
            slope = g * gain
            mean = tl.sum(slope, 1)[:, None] / C
            along = tl.sum(slope * normed, 1)[:, None] / C
            tl.store(dx_ptr + (b * L + row) * C + column, rstd * (slope - mean - normed * along), seen)
    if DMODULATION:
        place = (b * tl.num_programs(0) + part) * C + column
        tl.store(dscale_ptr + place, dscale, column < C)
        tl.store(dshift_ptr + place, dshift, column < C)


@triton.jit
def _gate_forward(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    x_b, x_l, x_c, y_b, y_l, y_c, gate_b, gate_c, L,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    row, valid = _rows_of(tl.program_id(0) * ROWS, ROWS, L, ROWS)
    seen = valid & (column < C)
    row64 = row.to(tl.int64)
    x = tl.load(x_ptr + b * x_b + row64 * x_l + column * x_c, seen, 0.0).to(tl.float32)  # [ROWS, BLOCK]
    y = tl.load(y_ptr + b * y_b + row64 * y_l + column * y_c, seen, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_b + column * gate_c, column < C, 0.0).to(tl.float32)  # [1, BLOCK]
    tl.store(out_ptr + (b * L + row) * C + column, x + y * gate, seen)


@triton.jit
def _gate_backward(
    g_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr,
    g_b, g_l, g_c, y_b, y_l, y_c, gate_b, gate_c, L, size,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DY: tl.constexpr, DGATE: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    gate = tl.load(gate_ptr + b * gate_b + column * gate_c, column < C, 0.0).to(tl.float32)  # [1, BLOCK]
    dgate = tl.zeros((1, BLOCK), tl.float32)
    for start in range(part * size, (part + 1) * size, ROWS):
        row, valid = _rows_of(start, (part + 1) * size - start, L, ROWS)
        seen = valid & (column < C)
        g = tl.load(g_ptr + b * g_b + row.to(tl.int64) * g_l + column * g_c, seen, 0.0).to(tl.float32)
        if DY:
            tl.store(dy_ptr + (b * L + row) * C + column, g * gate, seen)
        if DGATE:
            y = tl.load(y_ptr + b * y_b + row.to(tl.int64) * y_l + column * y_c, seen, 0.0).to(tl.float32)
            dgate += tl.sum(g * y, 0)[None, :]
    if DGATE:
        tl.store(dgate_ptr + (b * tl.num_programs(0) + part) * C + column, dgate, column < C)


def forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """See the reference."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid, options = _tiles(x)
        _norm_forward[grid](
            x, scale, shift, out, *x.stride(), *scale.stride(), *shift.stride(), x.shape[1], eps, **options
        )
    return out


def backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of x, scale and shift, as far as they are needed."""
    grad = grads[0]
    parts, size, options = _parts(x)
    modulation = needs[1] or needs[2]
    make = torch.zeros if grad is None or not x.numel() else torch.empty
    dx = make(x.shape if needs[0] else 0, dtype=x.dtype, device=x.device)
    sums = make(2, x.shape[0], parts if modulation else 0, x.shape[2], dtype=torch.float32, device=x.device)
    if grad is not None and x.numel():
        _norm_backward[(parts, x.shape[0])](
            grad, x, scale, dx, sums[0], sums[1], *grad.stride(), *x.stride(), *scale.stride(), x.shape[1], size, eps,
            DX=needs[0], DMODULATION=modulation, **options,
        )  # fmt: skip
    found = (dx, sums[0].sum(1).to(scale.dtype), sums[1].sum(1).to(shift.dtype))
    return [gradient for gradient, need in zip(found, needs, strict=True) if need]


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See the reference."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid, options = _tiles(x)
        _gate_forward[grid](
            x, y, gate, out, *x.stride(), *y.stride(), *gate.stride(), x.shape[1], **options
        )  # fmt: skip
    return out


def gated_residual_backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of y and gate, as far as they are needed."""
    grad = grads[0]
    parts, size, options = _parts(x)
    make = torch.zeros if grad is None or not x.numel() else torch.empty
    dy = make(y.shape if needs[1] else 0, dtype=y.dtype, device=y.device)
    sums = make(x.shape[0], parts if needs[2] else 0, x.shape[2], dtype=torch.float32, device=x.device)
    if grad is not None and x.numel():
        _gate_backward[(parts, x.shape[0])](
            grad, y, gate, dy, sums, *grad.stride(), *y.stride(), *gate.stride(), x.shape[1], size,
            DY=needs[1], DGATE=needs[2], **options,
        )  # fmt: skip
    found = (dy, sums.sum(1).to(gate.dtype))
    return [gradient for gradient, need in zip(found, needs[1:], strict=True) if need]


def tile_options(channels: int) -> dict[str, int]:
    """The kernels' constants for a number of channels: a row is held whole, several where rows are short."""
    block = triton.next_power_of_2(channels)
    rows = max(1, min(TILE // block, 16))
    return {"C": channels, "BLOCK": block, "ROWS": rows, "num_warps": 8 if block * rows > 2048 else 4}


def _tiles(x: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    options = tile_options(x.shape[2])
    return (triton.cdiv(x.shape[1], options["ROWS"]), x.shape[0]), options


def _parts(x: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    """Into how many parts a sample's rows are divided, the rows of each, and the kernels' constants."""
    options = tile_options(x.shape[2])
    tiles = triton.cdiv(x.shape[1], options["ROWS"])
    each = triton.cdiv(max(tiles, 1), PARTS)
    return max(triton.cdiv(tiles, each), 1), each * options["ROWS"], options
