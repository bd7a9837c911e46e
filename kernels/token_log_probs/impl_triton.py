"""Log-probability, entropy and KL of tokens in Triton: logits exist in tiles, backward in the slopes of some rows.

Forward, a program multiplies a tile of rows with a part of the vocabulary and keeps sums of its softmax; a second
kernel merges the parts in order. How the vocabulary is divided depends on its size alone, and a row of a tile knows
nothing of the other rows: so results do not depend on the batch. Backward, a kernel computes the logits of some rows
anew and writes the gradient of the loss with respect to them; the products of that with head and hidden states are
plain ones, which cuBLAS does best. Backward starts from the softmax's sums of the forward pass, whose tiles it repeats.

The logits' own products are as exact as float32 whatever torch's settings for products of matrices are; those plain
ones follow the settings, as a linear layer's gradients do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.token_log_probs.reference import live_rows

IMPOSSIBLE = tl.constexpr(-1e30)  # stands for minus infinity: 0 * log 0 is 0
PARTS = 16  # of the vocabulary, at most: programs for few rows
GROUP = 8  # tiles of rows whose programs follow one another: they share parts of the head in the cache
SLOPES = 2**25  # elements that the slopes of some rows may have: 64 MiB in 16 bits
ROWS = (1024, 8192)  # but not fewer rows and no more
SHARE = (256, 8)  # nor more than this part of all rows, but this many: else a small batch has all its logits in memory
LARGEST = 2.0**8  # of scaled slopes, per nat: float16 has room for gaps of 255 nats above, for 2**-32 of it below
MERGED = 128  # rows that a program merges


@triton.jit
def _logits(
    h_ptr, w_ptr, b_ptr, row, column, h_m, h_e, w_v, w_e, factor,
    V: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [M, V] of logits divided by the temperature, with IMPOSSIBLE for minus infinity. All rows [M], int64, have
    to exist; what stands in columns [V] that do not is left to the caller."""
    if w_ptr is None:
        h_at = h_ptr + row[:, None] * h_m + column.to(tl.int64)[None, :] * h_e
        z = tl.load(h_at, (column < V)[None, :], 0.0).to(tl.float32)
    else:
        column = tl.minimum(column, V - 1).to(tl.int64)
        z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in range(0, E, BLOCK_E):
            within = tl.arange(0, BLOCK_E)
            e = start + within
            first = tl.cast(start, tl.int64)
            h_at = h_ptr + first * h_e + row[:, None] * h_m + within[None, :] * h_e
            w_at = w_ptr + first * w_e + column[None, :] * w_v + within[:, None] * w_e
            if E % BLOCK_E == 0:
                h, w = tl.load(h_at), tl.load(w_at)  # [M, BLOCK_E], [BLOCK_E, V]
            else:
                h, w = tl.load(h_at, e[None, :] < E, 0.0), tl.load(w_at, e[:, None] < E, 0.0)
            z = tl.dot(h.to(w.dtype), w, z, input_precision=PRECISION)
        if b_ptr is not None:
            z += tl.load(b_ptr + column).to(tl.float32)[None, :]
    z = z * factor
    return tl.where(z < IMPOSSIBLE, IMPOSSIBLE, z)


@triton.jit
def _place(M, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows this program takes, and which part of the vocabulary. Parts of a group of tiles come one
    after the other, so that the group reads each part of the head once from memory."""
    program = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    first = program // (GROUP * PARTS) * GROUP
    within = program % (GROUP * PARTS)
    size = tl.minimum(tiles - first, GROUP)
    return first + within % size, within // size


@triton.jit
def _take(z, seen, peak, total):
    """Softmax sums of rows [M] with a tile more: the largest logit and the sum of exp(z - peak). Also z - peak and its
    exponentials [M, V], and by how much the peak rose, negative."""
    highest = tl.maximum(peak, tl.max(tl.where(seen, z, IMPOSSIBLE), 1))
    step = peak - highest
    centred = z - highest[:, None]
    powers = tl.where(seen, tl.exp(centred), 0.0)
    return centred, powers, step, highest, tl.exp(step) * total + tl.sum(powers, 1)


@triton.jit
def _forward(
    h_ptr, w_ptr, b_ptr, token_ptr, other_h_ptr, other_w_ptr, other_b_ptr, part_ptr,
    h_m, h_e, w_v, w_e, other_h_m, other_h_e, other_w_v, other_w_e, factor, M,
    V: tl.constexpr, E: tl.constexpr, OTHER_E: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr, OTHER_BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, OTHER_PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of some rows over a part of the vocabulary: part_ptr (8, PARTS, M)."""
    tile, part = _place(M, PARTS, BLOCK_M, GROUP)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(place, M - 1).to(tl.int64)
    token = tl.load(token_ptr + row)
    peak = tl.full((BLOCK_M,), IMPOSSIBLE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)
    other_peak, other_total = peak, total
    for start in range(part * PART, min((part + 1) * PART, V), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        seen = (column < V)[None, :]
        if KL:  # first: a product of float32 needs many registers
            y = _logits(
                other_h_ptr, other_w_ptr, other_b_ptr, row, column, other_h_m, other_h_e, other_w_v, other_w_e, factor,
                V, OTHER_E, BLOCK_M, BLOCK_V, OTHER_BLOCK_E, OTHER_PRECISION,
            )  # fmt: skip
        z = _logits(
            h_ptr, w_ptr, b_ptr, row, column, h_m, h_e, w_v, w_e, factor, V, E, BLOCK_M, BLOCK_V, BLOCK_E, PRECISION
        )
        own += tl.sum(tl.where(column[None, :] == token[:, None], z, 0.0), 1)
        earlier = total
        centred, powers, step, peak, total = _take(z, seen, peak, total)
        decay = tl.exp(step)
        along = decay * (along + step * earlier) + tl.sum(powers * centred, 1)
        if MEAN:
            mean += step * (start - part * PART) + tl.sum(tl.where(seen, centred, 0.0), 1)
        if KL:
            other_centred, _, other_step, other_peak, other_total = _take(y, seen, other_peak, other_total)
            gap = decay * (gap + (step - other_step) * earlier) + tl.sum(powers * (centred - other_centred), 1)
    size = tl.cast(PARTS, tl.int64) * M
    at = part_ptr + part.to(tl.int64) * M + place
    tl.store(at, peak, place < M)
    tl.store(at + size, total, place < M)
    tl.store(at + 2 * size, along, place < M)
    tl.store(at + 3 * size, own, place < M)
    if MEAN:
        tl.store(at + 4 * size, mean, place < M)
    if KL:
        tl.store(at + 5 * size, gap, place < M)
        tl.store(at + 6 * size, other_peak, place < M)
        tl.store(at + 7 * size, other_total, place < M)


@triton.jit
def _merge(
    part_ptr, own_ptr, entropy_ptr, kl_ptr, mean_ptr, sum_ptr, M,
    V: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts' sums in the vocabulary's order, and what follows from them. The mean and the gap, like the sum along,
    are sums over logits less the largest."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < M
    size = tl.cast(PARTS, tl.int64) * M
    peak = tl.full((BLOCK,), IMPOSSIBLE, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    own = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    other_peak, other_total = peak, total
    for part in range(PARTS):
        at = part_ptr + tl.cast(part, tl.int64) * M + place
        next_peak = tl.load(at, valid, 0.0)
        next_total = tl.load(at + size, valid, 1.0)
        highest = tl.maximum(peak, next_peak)
        step, next_step = peak - highest, next_peak - highest
        decay, next_decay = tl.exp(step), tl.exp(next_step)
        if KL:
            other_next = tl.load(at + 6 * size, valid, 0.0)
            other_highest = tl.maximum(other_peak, other_next)
            other_step, other_next_step = other_peak - other_highest, other_next - other_highest
            gap = decay * (gap + (step - other_step) * total) + next_decay * (
                tl.load(at + 5 * size, valid, 0.0) + (next_step - other_next_step) * next_total
            )
            other_total = tl.exp(other_step) * other_total + tl.exp(other_next_step) * tl.load(
                at + 7 * size, valid, 1.0
            )
            other_peak = other_highest
        along = decay * (along + step * total) + next_decay * (
            tl.load(at + 2 * size, valid, 0.0) + next_step * next_total
        )
        total = decay * total + next_decay * next_total
        peak = highest
        own += tl.load(at + 3 * size, valid, 0.0)
        if MEAN:
            mean += step * (part * PART) + tl.load(at + 4 * size, valid, 0.0)
            mean += next_step * tl.minimum(PART, V - part * PART)
    log = _log(total, peak)
    own = tl.where(own <= IMPOSSIBLE, float("-inf"), own)
    tl.store(own_ptr + place, own - peak - log, valid)
    tl.store(entropy_ptr + place, log - along / total, valid)
    at = sum_ptr + place
    tl.store(at, peak, valid)
    tl.store(at + M, log, valid)
    if MEAN:
        tl.store(mean_ptr + place, mean / V - log, valid)
    if KL:
        other_log = _log(other_total, other_peak)
        tl.store(kl_ptr + place, gap / total - log + other_log, valid)
        tl.store(at + tl.cast(M, tl.int64) * 2, other_peak, valid)
        tl.store(at + tl.cast(M, tl.int64) * 3, other_log, valid)


@triton.jit
def _log(total, peak):
    """NaN where no logit is above minus infinity."""
    return tl.where(peak > IMPOSSIBLE, tl.log(total), float("nan"))


@triton.jit
def _log1p_exp(z):
    """log(1 + exp(-|z|)) = 2 artanh(t), by its series: exact where the exponential is small, too."""
    e = tl.exp(-tl.abs(z))
    t = e / (2.0 + e)  # at most 1 / 3
    square = t * t
    series = 1.0 / 13 + square * (1.0 / 15)
    for i in tl.static_range(6):
        series = 1.0 / (11 - 2 * i) + square * series
    return 2.0 * t * series


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _finite(z):
    """Of a certain bit: 0 times it is 0. `_logits` sees to minus infinity."""
    return tl.where(z > -IMPOSSIBLE, -IMPOSSIBLE, z)


@triton.jit
def _bits_forward(
    h_ptr, w_ptr, b_ptr, bit_ptr, other_h_ptr, other_w_ptr, other_b_ptr,
    own_ptr, entropy_ptr, kl_ptr, mean_ptr,
    h_m, h_e, w_v, w_e, bit_m, bit_v, other_h_m, other_h_e, other_w_v, other_w_e, factor, M,
    V: tl.constexpr, E: tl.constexpr, OTHER_E: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, OTHER_BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, OTHER_PRECISION: tl.constexpr,
):  # fmt: skip
    """All bits of some rows; see the formulas in the reference."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(place, M - 1).to(tl.int64)
    own = tl.zeros((BLOCK_M,), tl.float32)
    entropy = tl.zeros((BLOCK_M,), tl.float32)
    kl = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        seen = (column < V)[None, :]
        z = _logits(
            h_ptr, w_ptr, b_ptr, row, column, h_m, h_e, w_v, w_e, factor, V, E, BLOCK_M, BLOCK_V, BLOCK_E, PRECISION
        )
        z = _finite(z)
        bit = tl.load(bit_ptr + row[:, None] * bit_m + column.to(tl.int64)[None, :] * bit_v, seen, 0) != 0
        likely = -_log1p_exp(z)  # log-probability of the likelier value
        size = tl.abs(z)  # of the less likely one that much less
        less = tl.minimum(tl.where(bit, z, -z), 0.0)
        own += tl.sum(tl.where(seen, likely + tl.where(less <= IMPOSSIBLE, float("-inf"), less), 0.0), 1)
        entropy += tl.sum(tl.where(seen, size * _sigmoid(-size) - likely, 0.0), 1)
        mean += tl.sum(tl.where(seen, likely - 0.5 * size, 0.0), 1)
        if KL:
            y = _logits(
                other_h_ptr, other_w_ptr, other_b_ptr, row, column, other_h_m, other_h_e, other_w_v, other_w_e, factor,
                V, OTHER_E, BLOCK_M, BLOCK_V, OTHER_BLOCK_E, OTHER_PRECISION,
            )  # fmt: skip
            y = _finite(y)
            other, turned = -_log1p_exp(y), tl.where(z < 0, -y, y)  # above 0 where both prefer the same value
            gap = _sigmoid(size) * (likely - (other + tl.minimum(turned, 0.0)))
            gap += _sigmoid(-size) * ((likely - size) - (other - tl.maximum(turned, 0.0)))
            kl += tl.sum(tl.where(seen, gap, 0.0), 1)
    tl.store(own_ptr + place, own, place < M)
    tl.store(entropy_ptr + place, entropy, place < M)
    if MEAN:
        tl.store(mean_ptr + place, mean, place < M)
    if KL:
        tl.store(kl_ptr + place, kl, place < M)


@triton.jit
def _slopes(
    h_ptr, w_ptr, b_ptr, token_ptr, other_h_ptr, other_w_ptr, other_b_ptr,
    of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, entropy_ptr, kl_ptr, sum_ptr, scale_ptr, slope_ptr, of_bias_ptr,
    h_m, h_e, w_v, w_e, token_m, token_v, other_h_m, other_h_e, other_w_v, other_w_e, factor, first, last, M,
    V: tl.constexpr, E: tl.constexpr, OTHER_E: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
    OTHER_BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, OTHER_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits before the temperature, of rows `first` to `last`: slope_ptr (last - first, V), times
    what scale_ptr (1) holds, and their sums over this program's rows, not scaled: of_bias_ptr (tiles of rows, V). 0 in
    rows whose incoming gradients are all 0."""
    tile, part = _place(last - first, PARTS, BLOCK_M, GROUP)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = place < last - first
    row = tl.minimum(first + place, last - 1).to(tl.int64)
    column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    seen = (column < V)[None, :]
    if of_kl_ptr is not None:
        y = _logits(
            other_h_ptr, other_w_ptr, other_b_ptr, row, column, other_h_m, other_h_e, other_w_v, other_w_e, factor,
            V, OTHER_E, BLOCK_M, BLOCK_V, OTHER_BLOCK_E, OTHER_PRECISION,
        )  # fmt: skip
    z = _logits(
        h_ptr, w_ptr, b_ptr, row, column, h_m, h_e, w_v, w_e, factor, V, E, BLOCK_M, BLOCK_V, BLOCK_E, PRECISION
    )
    own = tl.zeros((BLOCK_M,), tl.float32)
    of_entropy, of_kl, mean = own, own, own
    if of_own_ptr is not None:
        own = tl.load(of_own_ptr + row)
    if of_entropy_ptr is not None:
        of_entropy = tl.load(of_entropy_ptr + row)
    if of_kl_ptr is not None:
        of_kl = tl.load(of_kl_ptr + row)
    if of_mean_ptr is not None:
        mean = tl.load(of_mean_ptr + row)
    live = (own != 0) | (of_entropy != 0) | (of_kl != 0) | (mean != 0)
    slope = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if BITS:
        z = _finite(z)
        one, zero = _sigmoid(z), _sigmoid(-z)
        if of_own_ptr is not None:
            bit_at = token_ptr + row[:, None] * token_m + column.to(tl.int64)[None, :] * token_v
            bit = tl.load(bit_at, seen, 0) != 0
            slope += own[:, None] * tl.where(bit, zero, -one)
        if of_entropy_ptr is not None:
            slope -= of_entropy[:, None] * (z * (one * zero))
        if of_kl_ptr is not None:
            slope += of_kl[:, None] * ((z - _finite(y)) * (one * zero))
        if of_mean_ptr is not None:
            slope += mean[:, None] * (0.5 * (zero - one))
    else:
        sum_at = sum_ptr + row
        log_probs = z - tl.load(sum_at)[:, None] - tl.load(sum_at + M)[:, None]
        slope += -(own + mean)[:, None]
        if of_entropy_ptr is not None:
            slope -= of_entropy[:, None] * (log_probs + tl.load(entropy_ptr + row)[:, None])
        if of_kl_ptr is not None:
            size = tl.cast(M, tl.int64)
            other = y - tl.load(sum_at + 2 * size)[:, None] - tl.load(sum_at + 3 * size)[:, None]
            slope += of_kl[:, None] * (log_probs - other - tl.load(kl_ptr + row)[:, None])
        slope = tl.exp(log_probs) * slope + (mean / V)[:, None]
        token = tl.load(token_ptr + row * token_m)
        slope += tl.where(column[None, :] == token[:, None], own[:, None], 0.0)
    slope = tl.where((valid & live)[:, None] & seen, slope * factor, 0.0)
    at = slope_ptr + place.to(tl.int64)[:, None] * V + column[None, :]
    if of_bias_ptr is not None:
        tl.store(of_bias_ptr + tile.to(tl.int64) * V + column, tl.sum(slope, 0), column < V)
    if scale_ptr is not None:
        slope *= tl.load(scale_ptr)
    tl.store(at, slope, valid[:, None] & seen)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    reference_bias: torch.Tensor | None,
    temperature: float,
    mean: bool,
) -> tuple[torch.Tensor, ...]:
    """See the reference."""
    bits, kl = tokens.ndim == 3, reference_hidden is not None
    shape, none = tokens.shape[:2], (0,)
    sums = 0 if bits else 2 + 2 * kl
    shapes = (shape, shape, shape if kl else none, shape if mean else none, (sums, *shape))
    results = tuple(torch.empty(each, dtype=torch.float32, device=hidden.device) for each in shapes)
    count = shape.numel()
    if not count:
        return results
    head = _Head(hidden, weight, bias, reference_hidden, reference_weight, reference_bias, temperature)
    options = {**head.options, "KL": kl, "MEAN": mean}
    picked = tokens.flatten(0, 1)
    if bits:
        _bits_forward[(triton.cdiv(count, options["BLOCK_M"]),)](
            *head.tensors, picked, *head.others, *results[:4], *head.strides, *picked.stride(), *head.other_strides,
            head.factor, count, **options,
        )  # fmt: skip
        return results
    tiles = triton.cdiv(head.size, options["BLOCK_V"])
    each = triton.cdiv(tiles, PARTS)
    parts = triton.cdiv(tiles, each)
    found = torch.empty(8, parts, count, dtype=torch.float32, device=hidden.device)
    _forward[(triton.cdiv(count, options["BLOCK_M"]) * parts,)](
        *head.tensors, picked.contiguous(), *head.others, found, *head.strides, *head.other_strides, head.factor, count,
        PARTS=parts, PART=each * options["BLOCK_V"], GROUP=GROUP, **options,
    )  # fmt: skip
    _merge[(triton.cdiv(count, MERGED),)](
        found, *results, count, V=head.size, KL=kl, MEAN=mean, PARTS=parts, PART=each * options["BLOCK_V"],
        BLOCK=MERGED, num_warps=4,
    )  # fmt: skip
    return results


def backward(
    grads: Sequence[torch.Tensor | None],
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    reference_bias: torch.Tensor | None,
    temperature: float,
    mean: bool,
    results: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of hidden, weight and bias, as far as they are needed; the logits of some rows are computed anew.

    Slopes are rounded to the dtype of the head. Those of a mean over many tokens would be below the least float16, so
    there they are scaled by a power of two, which the float32 results of the products are divided by. Rows whose
    incoming gradients are all 0 are left out."""
    head = _Head(hidden, weight, bias, reference_hidden, reference_weight, reference_bias, temperature)
    of_rows = [None if g is None or not g.numel() else g.flatten().float().contiguous() for g in grads[:4]]
    picked = tokens.flatten(0, 1)
    count, size = len(picked), head.size
    token_strides = (*picked.stride(), 0)[:2]
    tiles = triton.cdiv(size, head.options["BLOCK_V"])

    def slopes(
        first: int, last: int, out: torch.Tensor, of_bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> None:
        blocks = triton.cdiv(last - first, head.options["BLOCK_M"])
        _slopes[(blocks * tiles,)](
            *head.tensors, picked, *head.others, *of_rows, results[1], results[2], results[4], scale, out, of_bias,
            *head.strides, *token_strides, *head.other_strides, head.factor, first, last, count,
            BITS=tokens.ndim == 3, PARTS=tiles, GROUP=GROUP, **head.options,
        )  # fmt: skip

    like = {"dtype": torch.float32, "device": hidden.device}
    of_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else None
    if weight is None:
        if of_hidden is not None and count:
            slopes(0, count, of_hidden)
        return [] if of_hidden is None else [of_hidden]
    matrix = weight.detach()
    of_weight = torch.zeros(weight.shape, **like) if needs[1] and not count else None
    of_bias = torch.zeros(size, **like) if needs[2] else None
    step = min(max(SLOPES // size, ROWS[0]), ROWS[1], max(SHARE[0], count // SHARE[1]))
    step = triton.cdiv(step, head.options["BLOCK_M"]) * head.options["BLOCK_M"]
    buffer = torch.empty(min(count, step), size, dtype=weight.dtype, device=hidden.device)
    live = live_rows(grads, tokens) if needs[1] else None
    for first in range(0, count, step):
        last = min(first + step, count)
        slope, states = buffer[: last - first], head.tensors[0][first:last]
        blocks = triton.cdiv(last - first, head.options["BLOCK_M"])
        sums = None if of_bias is None else torch.empty(blocks, size, **like)
        scale = _scale(of_rows, first, last, head.factor) if slope.dtype == torch.float16 else None
        slopes(first, last, slope, sums, scale)
        if of_hidden is not None:
            own = slope @ matrix if scale is None else _wide_product(slope, matrix).div_(scale)
            of_hidden.flatten(0, 1)[first:last] = own
        if live is not None:
            states = torch.where(live[first:last], states, 0)
            product = _wide_product(slope.T, states.to(slope.dtype))
            if scale is not None:
                product.div_(scale)
            of_weight = product if of_weight is None else of_weight.add_(product)
        if of_bias is not None:
            of_bias += sums.sum(0)
    found = [] if of_hidden is None else [of_hidden]
    if of_weight is not None:
        found.append(of_weight.to(weight.dtype))
    if of_bias is not None and bias is not None:
        found.append(of_bias.to(bias.dtype))
    return found


def _scale(of_rows: Sequence[torch.Tensor | None], first: int, last: int, factor: float) -> torch.Tensor | None:
    """The power of two (1) that brings the largest finite gradient of these rows to LARGEST / 2 or more, below
    LARGEST. It stays on the device."""
    given = [g[first:last] for g in of_rows if g is not None]
    if not given:
        return None
    largest = torch.stack(given).mul_(factor).abs_().nan_to_num_(0.0, 0.0, 0.0).amax().view(1)
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # its exponent alone
    return LARGEST / 2 / power.clamp_min(2.0**-100)


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Head:
    """What all launches are given of a head and the reference's."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        reference_hidden: torch.Tensor | None,
        reference_weight: torch.Tensor | None,
        reference_bias: torch.Tensor | None,
        temperature: float,
    ) -> None:
        self.size = hidden.shape[-1] if weight is None else len(weight)
        self.factor = 1.0 / temperature
        self.tensors, self.strides = _arguments(hidden, weight, bias)
        self.others, self.other_strides = _arguments(reference_hidden, reference_weight, reference_bias)
        width, other = (0 if h is None else h.shape[-1] for h in (hidden, reference_hidden))
        dtype, other_dtype = (
            h.dtype if w is None else w.dtype
            for h, w in ((hidden, weight), (hidden if reference_hidden is None else reference_hidden, reference_weight))
        )
        self.options = tile_options(self.size, width, other, dtype, other_dtype, weight is not None)


def _arguments(
    hidden: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """Rows (M, E), weight and bias as kernels take them, and the strides of the first two."""
    rows = None if hidden is None else hidden.detach().flatten(0, 1)
    strides = (t.stride() if t is not None else (0, 0) for t in (rows, weight))
    return (rows, weight, None if bias is None else bias.contiguous()), tuple(s for pair in strides for s in pair)


def tile_options(
    size: int, width: int, other: int, dtype: torch.dtype, other_dtype: torch.dtype, weighted: bool
) -> dict[str, Any]:
    """The kernels' constants for a vocabulary and hidden sizes and dtypes. None but those named OTHER depend on the
    reference, and none on the number of rows: a token's log-probability must not, to the bit."""

    def block(n: int, most: int) -> int:
        return max(16, min(triton.next_power_of_2(max(n, 1)), most))

    wide = dtype == torch.float32
    wide_other = other_dtype == torch.float32
    product = {"BLOCK_M": 64 if wide else 128, "num_warps": 8, "num_stages": 2 if wide else 3}
    plain = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}  # logits are read: no product to share loads
    return {
        **(product if weighted else plain),
        "V": size,
        "E": width,
        "OTHER_E": other,
        "BLOCK_V": block(size, 128),
        "BLOCK_E": block(width, 32 if wide else 64),
        "OTHER_BLOCK_E": block(other, 32 if wide_other else 64),
        "PRECISION": "tf32x3" if wide else "tf32",  # says nothing for 16 bits
        "OTHER_PRECISION": "tf32x3" if wide_other else "tf32",
    }
