"""Block-causal attention over a shared prefix in Triton, forward and backward.

A row of scale k sees the keys before ends[k]: the same for a whole scale, and never decreasing from row to row. So a
tile of queries needs no mask for the keys before its first row's end, one for those up to its last row's end, and never
visits the rest; which rows see a tile of keys is as simple. All that is known of the schedule is its K ends.

Backward, a tile of queries gathers its own gradient and a tile of keys its own, those of a shared prefix over all
samples of the group, one after the other: no two programs add to one place, and the order is always the same. The
scores are computed transposed where their transpose is needed, as no dot takes a transposed result of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.tiles import LOG2_E, attend, store, tile, tile_t

from fastvar.schedule import ScaleSchedule


@triton.jit
def _bounds(row, ends_ptr, K):
    """For rows [N] the first and one past the last token of their scales."""
    first = tl.zeros_like(row)
    last = tl.zeros_like(row)
    for k in range(K):
        end = tl.load(ends_ptr + K - 1 - k)
        last = tl.where(end > row, end, last)
        first = tl.maximum(first, tl.where(end <= row, end, 0))
    return first, last


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, lengths_ptr, ends_ptr, out_ptr, lse_ptr,
    q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d,
    pk_b, pk_l, pk_h, pk_d, pv_b, pv_l, pv_h, pv_d,
    L, K, P, GROUP, H, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PREFIX: tl.constexpr, LENGTHS: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head; the last tiles, which have most to do, come first."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = _bounds(tl.minimum(row, L - 1), ends_ptr, K)
    q = tile(q_ptr + b * q_b + h * q_h, row, q_l, q_d, L, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if PREFIX:
        seen = P
        if LENGTHS:
            seen = tl.load(lengths_ptr + b // GROUP).to(tl.int32)
        whole = seen // BLOCK_N * BLOCK_N
        pk, pv = prefix_k_ptr + b // GROUP * pk_b + h * pk_h, prefix_v_ptr + b // GROUP * pv_b + h * pv_h
        acc, total, peak = attend(
            acc, total, peak, q, pk, pv, pk_l, pk_d, pv_l, pv_d, 0, whole, first, last, factor,
            D, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        acc, total, peak = attend(
            acc, total, peak, q, pk, pv, pk_l, pk_d, pv_l, pv_d, whole, seen, first * 0, last * 0 + seen, factor,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    begin, whole = 0, tl.min(last) // BLOCK_N * BLOCK_N  # from one to the other nothing is masked
    if DIAGONAL:
        begin = tl.minimum((tl.max(first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, whole)
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, tl.min(first) // BLOCK_N * BLOCK_N, begin,
            first, last, factor, D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        whole = tl.maximum(whole, begin)
    else:
        first = first * 0
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, begin, whole, first, last, factor,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, k_d, v_l, v_d, whole, tl.max(last), first, last, factor,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    out_ptr += b * L * H * D + h * D
    store(out_ptr, row, H * D, acc / total[:, None], L, D, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * L + row, (peak + tl.log2(total)) / LOG2_E, row < L)


@triton.jit
def _delta(
    out_ptr, g_ptr, g_lse_ptr, delta_ptr, g_b, g_l, g_h, g_d, gl_b, gl_h, gl_l, L, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """What every score's gradient has subtracted: sum(out * gradient) of a row, less the gradient of its lse."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tile(out_ptr + b * L * H * D + h * D, row, H * D, 1, L, D, BLOCK_D, True)
    g = tile(g_ptr + b * g_b + h * g_h, row, g_l, g_d, L, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_LSE:
        delta -= tl.load(g_lse_ptr + b * gl_b + h * gl_h + row * gl_l, row < L, 0.0)
    tl.store(delta_ptr + (b * H + h) * L + row, delta, row < L)


@triton.jit
def _gather_dq(
    dq, q, g, lse, delta, k_ptr, v_ptr, k_l, k_d, v_l, v_d, begin, end, first, last, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient so far, with the keys from `begin` to `end`."""
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = tile_t(k_ptr, column, k_l, k_d, end, D, BLOCK_D, MASK)  # [BLOCK_D, N]
        p = tl.exp2(tl.dot(q, k, input_precision=PRECISION) * factor - lse[:, None])
        if MASK:
            p = tl.where((column[None, :] >= first[:, None]) & (column[None, :] < last[:, None]), p, 0.0)
        v = tile_t(v_ptr, column, v_l, v_d, end, D, BLOCK_D, MASK)  # [BLOCK_D, N]
        ds = p * (tl.dot(g, v, input_precision=PRECISION) - delta[:, None])
        k = tile(k_ptr, column, k_l, k_d, end, D, BLOCK_D, MASK)  # [N, BLOCK_D]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, lengths_ptr, ends_ptr, g_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d,
    pk_b, pk_l, pk_h, pk_d, pv_b, pv_l, pv_h, pv_d, g_b, g_l, g_h, g_d,
    L, K, P, GROUP, H, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PREFIX: tl.constexpr, LENGTHS: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_forward`, for the gradient of a tile of queries."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = _bounds(tl.minimum(row, L - 1), ends_ptr, K)
    q = tile(q_ptr + b * q_b + h * q_h, row, q_l, q_d, L, D, BLOCK_D, True)
    g = tile(g_ptr + b * g_b + h * g_h, row, g_l, g_d, L, D, BLOCK_D, True).to(q.dtype)
    lse = tl.load(lse_ptr + (b * H + h) * L + row, row < L, 0.0) * LOG2_E
    delta = tl.load(delta_ptr + (b * H + h) * L + row, row < L, 0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if PREFIX:
        seen = P
        if LENGTHS:
            seen = tl.load(lengths_ptr + b // GROUP).to(tl.int32)
        whole = seen // BLOCK_N * BLOCK_N
        pk, pv = prefix_k_ptr + b // GROUP * pk_b + h * pk_h, prefix_v_ptr + b // GROUP * pv_b + h * pv_h
        dq = _gather_dq(
            dq, q, g, lse, delta, pk, pv, pk_l, pk_d, pv_l, pv_d, 0, whole, first, last, factor,
            D, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, g, lse, delta, pk, pv, pk_l, pk_d, pv_l, pv_d, whole, seen, first * 0, last * 0 + seen, factor,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    begin, whole = 0, tl.min(last) // BLOCK_N * BLOCK_N
    if DIAGONAL:
        begin = tl.minimum((tl.max(first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, whole)
        dq = _gather_dq(
            dq, q, g, lse, delta, k_ptr, v_ptr, k_l, k_d, v_l, v_d, tl.min(first) // BLOCK_N * BLOCK_N, begin,
            first, last, factor, D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        whole = tl.maximum(whole, begin)
    else:
        first = first * 0
    dq = _gather_dq(
        dq, q, g, lse, delta, k_ptr, v_ptr, k_l, k_d, v_l, v_d, begin, whole, first, last, factor,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    dq = _gather_dq(
        dq, q, g, lse, delta, k_ptr, v_ptr, k_l, k_d, v_l, v_d, whole, tl.max(last), first, last, factor,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    store(dq_ptr + b * L * H * D + h * D, row, H * D, dq * scale, L, D, BLOCK_D)


@triton.jit
def _gather_dkv(
    dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, q_d, g_l, g_d, begin, end, first, last, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' and values' gradients so far, with the rows from `begin` to `end`; with MASK those from `first` to
    `last` [N] see a key."""
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < end
        q = tile_t(q_ptr, row, q_l, q_d, end, D, BLOCK_D, True)  # [BLOCK_D, M]
        lse = tl.load(lse_ptr + row, inside, float("inf")) * LOG2_E  # past the end all weights are 0
        p = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * factor - lse[None, :])  # [N, M]
        if MASK:
            p = tl.where((row[None, :] >= first[:, None]) & (row[None, :] < last[:, None]), p, 0.0)
        g = tile(g_ptr, row, g_l, g_d, end, D, BLOCK_D, True).to(k.dtype)  # [M, BLOCK_D]
        dv = tl.dot(p.to(k.dtype), g, dv, input_precision=PRECISION)
        g = tile_t(g_ptr, row, g_l, g_d, end, D, BLOCK_D, True).to(k.dtype)  # [BLOCK_D, M]
        delta = tl.load(delta_ptr + row, inside, 0.0)
        ds = p * (tl.dot(v, g, input_precision=PRECISION) - delta[None, :])
        q = tile(q_ptr, row, q_l, q_d, end, D, BLOCK_D, True)  # [M, BLOCK_D]
        dk = tl.dot(ds.to(k.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, ends_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_l, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d, g_b, g_l, g_h, g_d,
    L, K, H, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one head; the first ones are seen by most rows."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = _bounds(tl.minimum(column, L - 1), ends_ptr, K)  # of its scale: so a key's first row
    k = tile(k_ptr + b * k_b + h * k_h, column, k_l, k_d, L, D, BLOCK_D, True)
    v = tile(v_ptr + b * v_b + h * v_h, column, v_l, v_d, L, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q_ptr += b * q_b + h * q_h
    g_ptr += b * g_b + h * g_h
    lse_ptr += (b * H + h) * L
    delta_ptr += (b * H + h) * L
    begin, stop = tl.min(first), L
    whole = tl.max(first)  # from here on all rows see all keys of the tile
    if DIAGONAL:
        stop = tl.max(last)
        whole = stop
    else:
        last = last * 0 + L
    whole = begin + (whole - begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    dk, dv = _gather_dkv(
        dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, q_d, g_l, g_d, begin, tl.minimum(whole, stop), first, last,
        factor, D, BLOCK_D, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    dk, dv = _gather_dkv(
        dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, q_d, g_l, g_d, whole, stop, first, last, factor,
        D, BLOCK_D, BLOCK_M, False, PRECISION,
    )  # fmt: skip
    store(dk_ptr + b * L * H * D + h * D, column, H * D, dk * scale, L, D, BLOCK_D)
    store(dv_ptr + b * L * H * D + h * D, column, H * D, dv, L, D, BLOCK_D)


@triton.jit
def _backward_prefix(
    q_ptr, prefix_k_ptr, prefix_v_ptr, lengths_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_l, q_h, q_d, pk_b, pk_l, pk_h, pk_d, pv_b, pv_l, pv_h, pv_d, g_b, g_l, g_h, g_d,
    L, P, GROUP, H, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a prefix's keys of one head, with all rows of all samples of its group, in order."""
    s, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = P
    if LENGTHS:
        seen = tl.load(lengths_ptr + s).to(tl.int32)
    k = tile(prefix_k_ptr + s * pk_b + h * pk_h, column, pk_l, pk_d, seen, D, BLOCK_D, True)
    v = tile(prefix_v_ptr + s * pv_b + h * pv_h, column, pv_l, pv_d, seen, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if tl.program_id(0) * BLOCK_N < seen:
        for member in range(GROUP):
            b = s * GROUP + member
            dk, dv = _gather_dkv(
                dk, dv, k, v, q_ptr + b * q_b + h * q_h, g_ptr + b * g_b + h * g_h, lse_ptr + (b * H + h) * L,
                delta_ptr + (b * H + h) * L, q_l, q_d, g_l, g_d, 0, L, column, column, factor,
                D, BLOCK_D, BLOCK_M, False, PRECISION,
            )  # fmt: skip
    inside = (column < seen)[:, None]
    store(dk_ptr + s * P * H * D + h * D, column, H * D, tl.where(inside, dk * scale, 0.0), P, D, BLOCK_D)
    store(dv_ptr + s * P * H * D + h * D, column, H * D, tl.where(inside, dv, 0.0), P, D, BLOCK_D)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    softmax_scale: float,
    block_diagonal: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; lse (B, H, L) is always there."""
    batch, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    if out.numel():
        options = tile_options(head_dim, q.dtype)["forward"]
        _forward[(triton.cdiv(length, options["BLOCK_M"]), batch * heads)](
            q, k, v, prefix_k, prefix_v, prefix_lengths, _ends(schedule, q.device), out, lse,
            *q.stride(), *k.stride(), *v.stride(), *_stride(prefix_k), *_stride(prefix_v),
            length, len(schedule), *_group(q, prefix_k), heads, softmax_scale * LOG2_E.value,
            PREFIX=prefix_k is not None, LENGTHS=prefix_lengths is not None, DIAGONAL=block_diagonal, **options,
        )  # fmt: skip
    return out, lse


def backward(
    grads: Sequence[torch.Tensor | None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    softmax_scale: float,
    block_diagonal: bool,
    with_lse: bool,
    results: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of q, k, v and of the prefix's keys and values, as far as they are needed; results: those of
    `forward`."""
    out, lse = results
    grad, grad_lse = grads
    batch, length, heads, head_dim = q.shape
    own_needs, prefix_needs = needs[1] or needs[2], needs[3] or needs[4]
    made: list[torch.Tensor | None] = [
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if tensor is not None and wanted else None
        for tensor, wanted in (
            *((q, needs[0]), (k, own_needs), (v, own_needs)),
            *((prefix_k, prefix_needs), (prefix_v, prefix_needs)),
        )
    ]
    dq, dk, dv, dpk, dpv = made
    if out.numel() and not (grad is None and grad_lse is None):
        if grad is None:
            grad = torch.zeros((), dtype=q.dtype, device=q.device).expand(q.shape)
        options = tile_options(head_dim, q.dtype)
        lines = batch * heads
        delta = torch.empty_like(lse)
        size = options["delta"]
        _delta[(triton.cdiv(length, size["BLOCK_M"]), lines)](
            out, grad, grad_lse, delta, *grad.stride(), *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
            length, heads, HAS_LSE=grad_lse is not None, **size,
        )  # fmt: skip
        ends, factor = _ends(schedule, q.device), softmax_scale * LOG2_E.value
        shared = (*q.stride(), *k.stride(), *v.stride())
        if dq is not None:
            size = options["backward_q"]
            _backward_q[(triton.cdiv(length, size["BLOCK_M"]), lines)](
                q, k, v, prefix_k, prefix_v, prefix_lengths, ends, grad, lse, delta, dq,
                *shared, *_stride(prefix_k), *_stride(prefix_v), *grad.stride(),
                length, len(schedule), *_group(q, prefix_k), heads, factor, softmax_scale,
                PREFIX=prefix_k is not None, LENGTHS=prefix_lengths is not None, DIAGONAL=block_diagonal, **size,
            )  # fmt: skip
        size = options["backward_kv"]
        if dk is not None:
            _backward_kv[(triton.cdiv(length, size["BLOCK_N"]), lines)](
                q, k, v, ends, grad, lse, delta, dk, dv, *shared, *grad.stride(), length, len(schedule), heads,
                factor, softmax_scale, DIAGONAL=block_diagonal, **size,
            )  # fmt: skip
        if dpk is not None and prefix_k is not None and dpk.numel():
            tokens, group = _group(q, prefix_k)
            _backward_prefix[(triton.cdiv(tokens, size["BLOCK_N"]), prefix_k.shape[0] * heads)](
                q, prefix_k, prefix_v, prefix_lengths, grad, lse, delta, dpk, dpv, *q.stride(), *_stride(prefix_k),
                *_stride(prefix_v), *grad.stride(), length, tokens, group, heads, factor, softmax_scale,
                LENGTHS=prefix_lengths is not None, **size,
            )  # fmt: skip
    return [tensor for tensor, need in zip(made, needs, strict=False) if need and tensor is not None]


def tile_options(head_dim: int, dtype: torch.dtype) -> dict[str, dict[str, int | str]]:
    """Tile sizes, warps and stages of each kernel."""
    block = max(16, triton.next_power_of_2(head_dim))
    common: dict[str, int | str] = {"D": head_dim, "BLOCK_D": block}
    if dtype == torch.float32:  # three products in TF32 make one in float32; in full precision registers spill
        common["PRECISION"] = "tf32x3"
        size = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8 if block > 64 else 4, "num_stages": 1}
        tiles = {"forward": size, "backward_q": size, "backward_kv": size}
    else:
        common["PRECISION"] = "tf32"  # says nothing for 16 bits
        wide = block > 64
        tiles = {
            "forward": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8 if wide else 4, "num_stages": 3},
            "backward_q": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8 if wide else 4, "num_stages": 2},
            "backward_kv": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8 if wide else 4, "num_stages": 2},
        }
    found: dict[str, dict[str, int | str]] = {name: {**common, **size} for name, size in tiles.items()}
    found["delta"] = {"D": head_dim, "BLOCK_D": block, "BLOCK_M": 32, "num_warps": 4}
    return found


@lru_cache
def _ends(schedule: ScaleSchedule, device: torch.device) -> torch.Tensor:
    """(K,) on the device, made once for a schedule."""
    return torch.tensor(schedule.ends, dtype=torch.int32, device=device)


def _group(q: torch.Tensor, prefix: torch.Tensor | None) -> tuple[int, int]:
    """Tokens of the prefix and how many samples share one."""
    return (0, 1) if prefix is None else (prefix.shape[1], q.shape[0] // max(prefix.shape[0], 1))


def _stride(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()
