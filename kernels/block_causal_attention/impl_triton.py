"""Block-causal attention over a shared prefix in Triton, forward and backward.

A row of scale k sees the keys before ends[k]: the same for a whole scale, and never decreasing from row to row. So a
tile of queries needs no mask for the keys before its first row's end, one for those up to its last row's end, and never
visits the rest; which rows see a tile of keys is as simple. All that is known of the schedule is where each token's
scale begins and ends.

Backward, a tile of queries gathers its own gradient and a tile of keys its own: no two programs add to one place. Each
tile is loaded once and transposed where its transpose is needed; the scores are computed transposed for the keys'
gradients, as no dot takes a transposed result of another. The gradient of a shared prefix is a sum over all rows of all
samples of its group. These are divided into parts, as many as give a prefix alone enough programs, whose sums are added
in order.

All programs lie along one axis, as the others hold 65,535.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.block_causal_attention.tiles import BACKWARD_KV, BACKWARD_PREFIX, BACKWARD_Q, FORWARD
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiles import (
    LOG2_E,
    attend,
    common_factor,
    constants,
    head,
    rows_adjacent,
    softmax_step,
    store,
    tile,
)
from fastvar.kernels.common.tiling import Table, card, cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall

PROGRAMS = (
    384  # that a prefix alone should have: on an H200 192 were a little faster for four prefixes, for one too few
)
SHORTEST = 8  # tiles of rows that a part has at least
PARTS_BYTES = 256 << 20  # that the parts' sums may take; prefixes are taken in turn where more would be needed
CACHED = 16 << 20  # bytes of keys and values that neighbouring programs read
SUMMED = 1024  # numbers of a program that adds parts


@triton.jit
def _place(length, H, bundle, BLOCK: tl.constexpr):
    """A program's tile, sample and head. The heads of a bundle take turns, tile by tile: what they read stays in the
    cache, and the programs that come last, when multiprocessors run idle, are those that have least to do."""
    tiles = tl.cdiv(length, BLOCK)
    start = tl.program_id(0) // (bundle * tiles) * bundle  # of the bundle's heads, counted over all samples
    width = tl.minimum(bundle, tl.num_programs(0) // tiles - start)
    i = tl.program_id(0) - start * tiles
    line = start + i % width
    return i // width, (line // H).to(tl.int64), (line % H).to(tl.int64)


@triton.jit
def _seen(lengths_ptr, s, P):
    """Tokens of prefix s that are valid."""
    seen = P
    if lengths_ptr is not None:
        seen = tl.minimum(tl.maximum(tl.load(lengths_ptr + s), 0), P).to(tl.int32)
    return seen


@triton.jit
def _columns(begins_ptr, ends_ptr, start, row, L, BLOCK_M, BLOCK_N, DIAGONAL):
    """For a tile of rows from `start` on: the own keys that each row sees, from `lower` to before `upper` [M, 1]; and
    `begin`, `whole`, `end`: all rows see the keys from begin to whole, and none sees those from end on."""
    upper = tl.load(ends_ptr + tl.minimum(row, L - 1))[:, None]
    whole = tl.load(ends_ptr + start) // BLOCK_N * BLOCK_N
    highest = tl.minimum(start + BLOCK_M, L) - 1
    end = tl.load(ends_ptr + highest)
    lower, begin = 0, 0
    if DIAGONAL:
        lower = tl.load(begins_ptr + tl.minimum(row, L - 1))[:, None]
        begin = tl.minimum(tl.cdiv(tl.load(begins_ptr + highest), BLOCK_N) * BLOCK_N, whole)
    return lower, upper, begin, whole, end


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, k_tiles, v_tiles, line, d, begin, whole, end, lower, upper, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax so far, with all keys from `begin` to `whole` and, from there to `end`, those from `lower` to `upper`.
    The former come through the descriptors k_tiles and v_tiles if there are any, from row `line` and column `d` on."""
    if k_tiles is not None:
        for start in range(begin, whole, BLOCK_N):
            k, v = k_tiles.load([line + start, d]), v_tiles.load([line + start, d])
            acc, total, peak = softmax_step(acc, total, peak, q, k, v, None, factor, False, PRECISION)
    else:
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, begin, whole, lower, upper, factor,
            D, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    return attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, whole, end, lower, upper, factor,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip


@kernel
def block_causal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, k_tiles, v_tiles, pk_tiles, pv_tiles, lengths_ptr, begins_ptr, ends_ptr,
    out_ptr, lse_ptr, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, pk_b, pk_l, pk_h, pv_b, pv_l, pv_h,
    L, P, GROUP, H, bundle, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head; a head's last tiles, which have most to do, come first."""
    t, b, h = _place(L, H, bundle, BLOCK_M)
    start = (tl.cdiv(L, BLOCK_M) - 1 - t) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    q = tile(head(q_ptr, b, h, q_b, q_h, ALIGNED), row, q_l, L, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    d = (h * D).to(tl.int32)
    if pk_ptr is not None:
        s = b // GROUP
        seen = _seen(lengths_ptr, s, P)
        acc, total, peak = _attend(
            acc, total, peak, q, head(pk_ptr, s, h, pk_b, pk_h, ALIGNED), head(pv_ptr, s, h, pv_b, pv_h, ALIGNED),
            pk_l, pv_l, pk_tiles, pv_tiles, (s * P).to(tl.int32), d, 0, seen // BLOCK_N * BLOCK_N, seen, 0, seen,
            factor, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    k_ptr = head(k_ptr, b, h, k_b, k_h, ALIGNED)
    v_ptr = head(v_ptr, b, h, v_b, v_h, ALIGNED)
    lower, upper, begin, whole, end = _columns(begins_ptr, ends_ptr, start, row, L, BLOCK_M, BLOCK_N, DIAGONAL)
    if DIAGONAL:
        low = tl.load(begins_ptr + start) // BLOCK_N * BLOCK_N
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, low, begin, lower, upper, factor,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, k_tiles, v_tiles, (b * L).to(tl.int32), d,
        begin, whole, end, lower, upper, factor, D, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    store(out_ptr + b * L * H * D + h * D, row, H * D, acc / total[:, None], L, D, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * L + row, (peak + tl.log2(total)) / LOG2_E, row < L)


@triton.jit
def _gather_dq(
    dq, q, g, lse, delta, k_ptr, v_ptr, k_l, v_l, begin, end, lower, upper, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient so far, with the keys from `begin` to `end`; as `attend`."""
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k = tile(k_ptr, column, k_l, end, D, BLOCK_D, MASK)
        v = tile(v_ptr, column, v_l, end, D, BLOCK_D, MASK)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor - lse[:, None])  # [M, N]
        if MASK:
            p = tl.where((column[None, :] >= lower) & (column[None, :] < upper), p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@kernel
def block_causal_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, lengths_ptr, begins_ptr, ends_ptr, out_ptr, g_ptr, lse_ptr, g_lse_ptr,
    delta_ptr, dq_ptr, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, pk_b, pk_l, pk_h, pv_b, pv_l, pv_h, g_b, g_l, g_h,
    L, P, GROUP, H, bundle, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As the forward kernel, for the gradient of a tile of queries. On the way `delta`, which is subtracted from every
    score's gradient: a row's sum(out * gradient), less the gradient of its lse."""
    t, b, h = _place(L, H, bundle, BLOCK_M)
    start = (tl.cdiv(L, BLOCK_M) - 1 - t) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    line = (b * H + h) * L + row
    g = tile(head(g_ptr, b, h, g_b, g_h, ALIGNED), row, g_l, L, D, BLOCK_D, True)
    out = tile(out_ptr + b * L * H * D + h * D, row, H * D, L, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    if g_lse_ptr is not None:
        delta -= tl.load(g_lse_ptr + line, row < L, 0.0)
    tl.store(delta_ptr + line, delta, row < L)
    if dq_ptr is not None:
        q = tile(head(q_ptr, b, h, q_b, q_h, ALIGNED), row, q_l, L, D, BLOCK_D, True)
        lse = tl.load(lse_ptr + line, row < L, 0.0) * LOG2_E
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if pk_ptr is not None:
            s = b // GROUP
            seen = _seen(lengths_ptr, s, P)
            whole = seen // BLOCK_N * BLOCK_N
            pk_ptr = head(pk_ptr, s, h, pk_b, pk_h, ALIGNED)
            pv_ptr = head(pv_ptr, s, h, pv_b, pv_h, ALIGNED)
            dq = _gather_dq(
                dq, q, g, lse, delta, pk_ptr, pv_ptr, pk_l, pv_l, 0, whole, 0, seen, factor,
                D, BLOCK_D, BLOCK_N, False, PRECISION,
            )  # fmt: skip
            dq = _gather_dq(
                dq, q, g, lse, delta, pk_ptr, pv_ptr, pk_l, pv_l, whole, seen, 0, seen, factor,
                D, BLOCK_D, BLOCK_N, True, PRECISION,
            )  # fmt: skip
        k_ptr = head(k_ptr, b, h, k_b, k_h, ALIGNED)
        v_ptr = head(v_ptr, b, h, v_b, v_h, ALIGNED)
        lower, upper, begin, whole, end = _columns(begins_ptr, ends_ptr, start, row, L, BLOCK_M, BLOCK_N, DIAGONAL)
        if DIAGONAL:
            low = tl.load(begins_ptr + start) // BLOCK_N * BLOCK_N
            dq = _gather_dq(
                dq, q, g, lse, delta, k_ptr, v_ptr, k_l, v_l, low, begin, lower, upper, factor,
                D, BLOCK_D, BLOCK_N, True, PRECISION,
            )  # fmt: skip
        dq = _gather_dq(
            dq, q, g, lse, delta, k_ptr, v_ptr, k_l, v_l, begin, whole, lower, upper, factor,
            D, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, g, lse, delta, k_ptr, v_ptr, k_l, v_l, whole, end, lower, upper, factor,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        store(dq_ptr + b * L * H * D + h * D, row, H * D, dq * scale, L, D, BLOCK_D)


@triton.jit
def _add_rows(
    dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, g_l, row, L, lower, upper, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' and values' gradients so far, with one tile of rows. Those from `lower` to `upper` [N, 1] see a key,
    all if these are None. Without CHECK no row is past the end."""
    place, inside, other = row, None, None
    if CHECK:  # past the end it is the last row once more, with weights of 0
        place, inside, other = tl.minimum(row, L - 1), row < L, float("inf") if lower is None else 0.0
    q = tile(q_ptr, place, q_l, L, D, BLOCK_D, False)
    g = tile(g_ptr, place, g_l, L, D, BLOCK_D, False)
    lse = tl.load(lse_ptr + row, inside, other) * LOG2_E
    delta = tl.load(delta_ptr + row, inside, None if other is None else 0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor - lse[None, :])  # [N, M]
    if lower is not None:
        p = tl.where((row[None, :] >= lower) & (row[None, :] < upper), p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@kernel
def block_causal_attention_bwd_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, begins_ptr, ends_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, g_b, g_l, g_h, L, H, bundle, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one head; the first ones are seen by most rows."""
    t, b, h = _place(L, H, bundle, BLOCK_N)
    start = t * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    k = tile(head(k_ptr, b, h, k_b, k_h, ALIGNED), column, k_l, L, D, BLOCK_D, True)
    v = tile(head(v_ptr, b, h, v_b, v_h, ALIGNED), column, v_l, L, D, BLOCK_D, True)
    highest = tl.minimum(start + BLOCK_N, L) - 1
    last = L
    if DIAGONAL:
        last = tl.load(ends_ptr + start)
    last = last // BLOCK_M * BLOCK_M
    whole = tl.minimum(tl.cdiv(tl.load(begins_ptr + highest), BLOCK_M) * BLOCK_M, last)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q_ptr = head(q_ptr, b, h, q_b, q_h, ALIGNED)
    g_ptr = head(g_ptr, b, h, g_b, g_h, ALIGNED)
    lse_ptr += (b * H + h) * L
    delta_ptr += (b * H + h) * L
    if DIAGONAL and BLOCK_D > 64:  # the registers of a second loop leave room for one program where there were two
        whole = last
    else:
        for begin in range(whole, last, BLOCK_M):  # rows that see all keys of the tile
            dk, dv = _add_rows(
                dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, g_l, begin + tl.arange(0, BLOCK_M), L, None, None,
                factor, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip
    # The others, before and after them. What this loop alone needs is loaded here: registers are short in the first.
    lower = tl.load(begins_ptr + tl.minimum(column, L - 1))[:, None]  # of its scale: the first row that sees a key
    upper, end = L, L
    if DIAGONAL:
        upper = tl.load(ends_ptr + tl.minimum(column, L - 1))[:, None]
        end = tl.load(ends_ptr + highest)
    first = tl.load(begins_ptr + start) // BLOCK_M * BLOCK_M
    for begin in range(first, end - (last - whole), BLOCK_M):
        row = begin + tl.where(begin < whole, 0, last - whole) + tl.arange(0, BLOCK_M)
        dk, dv = _add_rows(
            dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, q_l, g_l, row, L, lower, upper, factor,
            D, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    store(dk_ptr + b * L * H * D + h * D, column, H * D, dk * scale, L, D, BLOCK_D)
    store(dv_ptr + b * L * H * D + h * D, column, H * D, dv, L, D, BLOCK_D)


@kernel
def block_causal_attention_bwd_prefix_kernel(
    q_ptr, pk_ptr, pv_ptr, lengths_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_l, q_h, pk_b, pk_l, pk_h, pv_b, pv_l, pv_h, g_b, g_l, g_h, COUNT, L, P, GROUP, H, PARTS, factor, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of one of COUNT prefixes, with one part of all rows of its group; the sum goes to place
    [part, prefix] of (PARTS, COUNT, P, H, D)."""
    t, place, h = _place(P, H, 1, BLOCK_N)
    part, s = place // COUNT, place % COUNT
    column = t * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = _seen(lengths_ptr, s, P)
    k = tile(head(pk_ptr, s, h, pk_b, pk_h, ALIGNED), column, pk_l, seen, D, BLOCK_D, True)
    v = tile(head(pv_ptr, s, h, pv_b, pv_h, ALIGNED), column, pv_l, seen, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tiles = tl.cdiv(L, BLOCK_M)  # of a sample's rows
    begin = (part * tiles * GROUP // PARTS).to(tl.int32)
    end = ((part + 1) * tiles * GROUP // PARTS).to(tl.int32)
    end = tl.where(t * BLOCK_N < seen, end, begin)
    for i in range(begin, end):
        b = s * GROUP + i // tiles
        line = (b * H + h) * L
        q, g = head(q_ptr, b, h, q_b, q_h, ALIGNED), head(g_ptr, b, h, g_b, g_h, ALIGNED)
        row = i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        dk, dv = _add_rows(
            dk, dv, k, v, q, g, lse_ptr + line, delta_ptr + line, q_l, g_l, row, L, None, None, factor,
            D, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    inside = (column < seen)[:, None]
    target = place * P * H * D + h * D
    store(dk_ptr + target, column, H * D, tl.where(inside, dk * scale, 0.0), P, D, BLOCK_D)
    store(dv_ptr + target, column, H * D, tl.where(inside, dv, 0.0), P, D, BLOCK_D)


@kernel
def block_causal_attention_bwd_prefix_sum_kernel(
    dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, size, PARTS, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums over the first dimension of (PARTS, size), one after the other."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dk = tl.zeros((BLOCK,), tl.float32)
    dv = tl.zeros((BLOCK,), tl.float32)
    for _ in range(PARTS):
        dk += tl.load(dk_parts_ptr + place, inside, 0.0)
        dv += tl.load(dv_parts_ptr + place, inside, 0.0)
        dk_parts_ptr += size
        dv_parts_ptr += size
    tl.store(dk_ptr + place, dk, inside)
    tl.store(dv_ptr + place, dv, inside)


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    batch, length, heads, _ = call.q.shape
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=call.q.device)
    if not out.numel():
        return out, lse
    given = _Given(call)
    q, k, v, pk, pv = given.tensors
    softmax_scale = call.softmax_scale
    if softmax_scale < 0:  # the greatest score is the greatest product's
        q, softmax_scale = -q, -softmax_scale
    size = _tile(FORWARD, q, k, v, pk, pv)
    keys = (k, v, pk, pv)
    tiles = [_descriptor(x, size["BLOCK_N"]) for x in keys] if size.pop("DESCRIPTORS") else [None] * 4
    if any(tiled is None and x is not None for tiled, x in zip(tiles, keys, strict=True)):
        tiles = [None] * 4
    block_causal_attention_fwd_kernel[(cdiv(length, size["BLOCK_M"]) * batch * heads,)](
        q, *keys, *tiles, given.lengths, *given.spans, out, lse, *_strides(q, *keys),
        length, given.tokens, given.group, heads, given.bundle, softmax_scale * LOG2_E.value,
        DIAGONAL=call.block_diagonal, **size,
    )  # fmt: skip
    return out, lse


def backward(
    call: AttentionCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor | None]:
    """Gradients of q, k, v and of the prefix's keys and values, as far as they are needed; saved: the results."""
    (out, lse), (grad, grad_lse) = saved, grads
    batch, length, heads, _ = call.q.shape
    own, shared = needs.k or needs.v, needs.prefix_k or needs.prefix_v
    make = torch.empty if out.numel() else torch.zeros

    def room(tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        return make(tensor.shape, dtype=tensor.dtype, device=tensor.device) if wanted else None

    dq, dk, dv = room(call.q, needs.q), room(call.k, own), room(call.v, own)
    dpk = dpv = None
    if call.prefix is not None:
        dpk, dpv = room(call.prefix.k, shared), room(call.prefix.v, shared)
    if out.numel():
        given = _Given(call)
        q, k, v, pk, pv = given.tensors
        g = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if grad is None else rows_adjacent(grad.to(q.dtype))
        factor = call.softmax_scale * LOG2_E.value
        delta = torch.empty_like(lse)
        size = _tile(BACKWARD_Q, *given.tensors, g)
        block_causal_attention_bwd_dq_kernel[(cdiv(length, size["BLOCK_M"]) * batch * heads,)](
            q, k, v, pk, pv, given.lengths, *given.spans, out, g, lse,
            None if grad_lse is None else grad_lse.contiguous(), delta, dq, *_strides(q, k, v, pk, pv, g),
            length, given.tokens, given.group, heads, given.bundle, factor, call.softmax_scale,
            DIAGONAL=call.block_diagonal, **size,
        )  # fmt: skip
        if dk is not None:
            size = _tile(BACKWARD_KV, q, k, v, g)
            block_causal_attention_bwd_dk_dv_kernel[(cdiv(length, size["BLOCK_N"]) * batch * heads,)](
                q, k, v, *given.spans, g, lse, delta, dk, dv, *_strides(q, k, v, g), length, heads, given.bundle,
                factor, call.softmax_scale, DIAGONAL=call.block_diagonal, **size,
            )  # fmt: skip
        if dpk is not None and dpv is not None and pk is not None and pv is not None:
            _prefix_gradients(given, pk, pv, g, lse, delta, dpk, dpv)
    return {"q": dq, "k": dk, "v": dv, "prefix_k": dpk, "prefix_v": dpv}


class _Given:
    """A call as the kernels take it.

    Attributes:
        tensors: q, k, v and the prefix's keys and values, None where there are no tokens; rows adjacent.
        lengths: of the prefixes, or None.
        tokens: of a prefix.
        group: samples that share one.
        spans: see `_spans`.
        bundle: heads whose keys and values fit into a third of an H200's cache.
        softmax_scale: that of the call.
    """

    def __init__(self, call: AttentionCall) -> None:
        q, prefix = call.q, call.prefix
        pk = pv = self.lengths = None
        self.tokens, self.group = 0, 1
        if prefix is not None:
            self.lengths = None if prefix.lengths is None else prefix.lengths.contiguous()
            if prefix.k.numel():
                pk, pv = rows_adjacent(prefix.k), rows_adjacent(prefix.v)
                self.tokens, self.group = prefix.k.shape[1], q.shape[0] // prefix.k.shape[0]
        self.tensors = (rows_adjacent(q), rows_adjacent(call.k), rows_adjacent(call.v), pk, pv)
        self.spans = _spans(call.schedule, q.device)
        self.bundle = max(min(CACHED // (2 * q.shape[1] * q.shape[3] * q.element_size()), 32), 1)
        self.softmax_scale = call.softmax_scale


def _prefix_gradients(
    given: _Given,
    pk: torch.Tensor,
    pv: torch.Tensor,
    g: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Into dk and dv. How rows are divided depends on L, P, G, H and the tile alone, not on how many prefixes there
    are."""
    q, lengths, group = given.tensors[0], given.lengths, given.group
    (count, tokens, heads, _), length = pk.shape, q.shape[1]
    size = _tile(BACKWARD_PREFIX, q, pk, pv, g)
    programs = cdiv(tokens, size["BLOCK_N"]) * heads
    longest = cdiv(length, size["BLOCK_M"]) * group // SHORTEST
    parts = max(min(cdiv(PROGRAMS, programs), longest), 1)
    together = count if parts == 1 else max(min(count, PARTS_BYTES // (parts * 8 * dk[0].numel())), 1)
    for first in range(0, count, together):
        some, rows = slice(first, first + together), slice(first * group, (first + together) * group)
        sums = dks, dvs = dk[some], dv[some]
        if parts > 1:
            shape = (parts, *dks.shape)
            dks, dvs = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in sums)
        block_causal_attention_bwd_prefix_kernel[(programs * parts * len(sums[0]),)](
            q[rows], pk[some], pv[some], None if lengths is None else lengths[some], g[rows], lse[rows], delta[rows],
            dks, dvs, *_strides(q, pk, pv, g), len(sums[0]), length, tokens, group, heads, parts,
            given.softmax_scale * LOG2_E.value, given.softmax_scale, **size,
        )  # fmt: skip
        if parts > 1:
            numel = sums[0].numel()
            block_causal_attention_bwd_prefix_sum_kernel[(cdiv(numel, SUMMED),)](
                dks, dvs, *sums, numel, parts, BLOCK=SUMMED, num_warps=4
            )


def _tile(table: Table, q: torch.Tensor, *others: torch.Tensor | None) -> dict[str, Any]:
    """A kernel's constants."""
    _, length, _, head_dim = q.shape
    chosen = table.choose(card(q.device), bits=8 * q.element_size(), head_dim=head_dim, length=length)
    return {**constants(head_dim, q.dtype), **chosen, "ALIGNED": common_factor(q, *others)}


@cache  # nothing is ever dropped: a CUDA graph may read it
def _spans(schedule: ScaleSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) each: the first token of a token's scale and one past the last, made once for a schedule and a device."""
    pairs = zip(schedule.starts, schedule.ends, strict=True)
    both = torch.tensor([pair for pair in pairs for _ in range(pair[1] - pair[0])], dtype=torch.int32)
    begins, ends = both.T.contiguous().to(device).unbind()
    return begins, ends


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    """Strides of samples, rows and heads; zeros where there is no tensor."""
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def _descriptor(tensor: torch.Tensor | None, rows: int) -> TensorDescriptor | None:
    """For tiles of so many rows of (B, L, H, D), taken as a matrix (B L, H D); None where strides or addresses are not
    such that the hardware can take it so."""
    if tensor is None:
        return None
    batch, length, heads, head_dim = tensor.shape
    stride, unit = tensor.stride(1), 16 // tensor.element_size()  # elements of 16 bytes
    fits = (
        (tensor.stride(0) == length * stride or batch == 1)
        and (tensor.stride(2) == head_dim or heads == 1)
        and stride >= heads * head_dim
        and stride % unit == 0
        and tensor.data_ptr() % 16 == 0
        and head_dim % unit == 0
        and head_dim & (head_dim - 1) == 0
        and batch * length < 2**31
    )
    if not fits:
        return None
    matrix = tensor.as_strided((batch * length, heads * head_dim), (stride, 1))
    return TensorDescriptor.from_tensor(matrix, [rows, head_dim])
