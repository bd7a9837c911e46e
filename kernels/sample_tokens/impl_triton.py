"""Drawing tokens and bits in Triton, in one launch.

A program holds one row of logits in registers. The smallest logit that top-k or top-p keeps is found by a search that
adds up, in a fixed order, the weights below a bound and moves the bound; nothing is sorted. The token is then found in
two steps: the block of logits in which the cumulative sum passes the target, and the place in that block. Within a
block sums are float32, across blocks float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.exponential import exp
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.philox import uniform
from fastvar.kernels.common.tiling import card, cdiv, power_of_2
from fastvar.kernels.sample_tokens import tiles

if TYPE_CHECKING:
    from fastvar.ops.sample_tokens import SampleCall

STREAM = tl.constexpr(0)  # of the random numbers, that of the reference
DEPTH = tl.constexpr(87.0)  # so far below the largest logit weights leave the range of normal numbers
HALVE = tl.constexpr(6)  # every so many steps the search halves what is left
LARGEST = tl.constexpr(1e30)  # stands for an infinite logit of a bit
STEPS = tl.constexpr(6 * 33)  # that halve all float32 numbers; only NaN takes so many


@triton.jit
def _key(x):
    """float32 to int64 in the same order, neighbours to neighbours."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _below(z, weights, bound, MASS: tl.constexpr):
    """The weight of all z below a bound: their number, or with MASS the sum of their weights."""
    if MASS:
        return tl.sum(tl.where(z < bound, weights, 0.0))
    else:
        return tl.sum(tl.where(z < bound, 1.0, 0.0))


@triton.jit
def _search(z, weights, low, high, under, upto, target, MASS: tl.constexpr):
    """The largest bound with a weight of at most `target` below it, or one that leaves the same z below it.

    It is looked for from low to high, the largest z; `under` is the weight below low, `upto` that of all. With MASS the
    weights are exp(z - high), else 1. Each step compares all z with one bound. It aims by interpolation, for masses
    along exp(z), with the Illinois rule: an end that stays counts half.
    """
    peak, high = high, _value(_key(high) + 1)
    unit = tl.full((), 1.0, tl.float32)
    one = tl.exp(low - peak) if MASS else unit  # the least that a z between the bounds weighs
    step, side, between = tl.full((), 0, tl.int32), 0, low < high
    low_share, high_share = unit, unit
    while between & (under <= target) & (upto - under > 1.5 * one) & (step < STEPS):
        step += 1
        before = (target - under + 0.5 * one) * low_share
        share = before / (before + tl.maximum(upto - target - 0.5 * one, 0.0) * high_share)
        if MASS:
            least = tl.exp(low - high)
            middle = high + tl.log(least + share * (1 - least))
        else:
            middle = low + share * (high - low)
        if (step % HALVE == 0) | ~((middle > low) & (middle < high)):
            middle = _value((_key(low) + _key(high)) >> 1)
            between = (middle > low) & (middle < high)  # else neighbours: the last step
        below = _below(z, weights, middle, MASS)
        empty = (below == under) | (below == upto)
        if below <= target:
            low, under = middle, below
            low_share, high_share = unit, tl.where(side > 0, high_share * 0.5, unit)
            side = 1
        else:
            high, upto = middle, below
            low_share, high_share = tl.where(side < 0, low_share * 0.5, unit), unit
            side = -1
        if empty:  # equal logits perhaps: draw the bounds together around what lies between them
            lowest = tl.min(tl.where(z >= low, z, float("inf")))
            high = _value(_key(tl.max(tl.where(z < high, z, float("-inf")))) + 1)
            low = lowest
        if MASS:
            one = tl.exp(low - peak)
    return low


@triton.jit
def _kept(z, peak, top_k, rest, ONE: tl.constexpr, FEW: tl.constexpr, SHARE: tl.constexpr):
    """Weights exp(z - peak), 0 for what top-k and then top-p drop, and a bound below which that lies; `rest` is 1 - p.

    ONE keeps what equals the largest, FEW the top k of all, SHARE the mass p of what is left.
    """
    bound = tl.full((), float("-inf"), tl.float32)
    if ONE:
        bound = peak
    elif FEW or SHARE:
        bound = tl.maximum(tl.min(tl.where(z == float("-inf"), peak, z)), peak - DEPTH)
    if FEW:
        size = tl.full((), z.numel, tl.float32)
        bound = _search(z, z, bound, peak, _below(z, z, bound, False), size, size - top_k, False)
    weights = tl.where(z < bound, 0.0, exp(z - peak))  # NaN stays
    if SHARE and not ONE:
        total = tl.sum(weights)
        bound = _search(z, weights, bound, peak, tl.zeros_like(total), total, rest * total, True)
        weights = tl.where(z < bound, 0.0, weights)
    return weights, bound


@triton.jit
def _scores(
    logits, others, place, logits_v, others_v, gain, guidance, temperature,
    V: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """The guided and the own logits at some places of a row over the temperature; minus infinity past its end. Each
    operation is rounded as in the reference."""
    seen = place < V
    place = place.to(tl.int64)
    own = tl.load(logits + place * logits_v, seen, float("-inf")).to(tl.float32)
    z = own
    if GUIDED:
        other = tl.load(others + place * others_v, seen, 0.0).to(tl.float32)
        # what the condition makes impossible stays so, as do places past the end
        z = tl.where(own == float("-inf"), own, own * gain - other * guidance)
    if TEMPERED:
        z, own = tl.div_rn(z, temperature), tl.div_rn(own, temperature)
    return z, own


@kernel(do_not_specialize=["count", "position", "top_k"])
def sample_tokens_fwd_kernel(
    logits_ptr, others_ptr, seeds_ptr, tokens_ptr, own_ptr, sampled_ptr,
    logits_b, logits_n, logits_v, others_b, others_n, others_v, seeds_b, count, position,
    gain, guidance, temperature, top_k, rest,
    V: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
    ONE: tl.constexpr, FEW: tl.constexpr, SHARE: tl.constexpr, LOG_PROBS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, i = (row // count).to(tl.int64), (row % count).to(tl.int64)
    logits = logits_ptr + b * logits_b + i * logits_n
    others = others_ptr
    if GUIDED:
        others += b * others_b + i * others_n
    block, column = tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    place = block[:, None] * WIDTH + column[None, :]  # [BLOCKS, WIDTH]
    z, own = _scores(
        logits, others, place, logits_v, others_v, gain, guidance, temperature, V, GUIDED, TEMPERED
    )  # fmt: skip
    if LOG_PROBS:
        own_peak = tl.max(own)
        own_total = tl.sum(exp(own - own_peak))
    peak = tl.max(z)
    weights, bound = _kept(z, peak, top_k, rest, ONE, FEW, SHARE)
    sums = tl.cumsum(tl.sum(weights, 1).to(tl.float64), 0)  # [BLOCKS]
    total = tl.sum(tl.where(block == BLOCKS - 1, sums, 0.0))  # the last one: a maximum would leave NaN out
    target = uniform(tl.load(seeds_ptr + b * seeds_b), STREAM, position + i).to(tl.float64) * total  # below the total
    chosen = tl.sum((sums <= target).to(tl.int32))
    start = tl.max(tl.where(block < chosen, sums, 0.0))
    # The row is in registers, where no index reaches: its block is read again.
    z, own = _scores(
        logits, others, chosen * WIDTH + column, logits_v, others_v, gain, guidance, temperature, V, GUIDED, TEMPERED
    )  # fmt: skip
    weights = tl.where(z < bound, 0.0, exp(z - peak))
    sums = start + tl.cumsum(weights.to(tl.float64), 0)  # [WIDTH]
    # Here sums are of float64, so that rounding may leave the last of them at the target.
    last_kept = tl.max(tl.where(weights > 0, column, 0))
    chosen_column = tl.minimum(tl.sum((sums <= target).to(tl.int32)), last_kept)
    tl.store(tokens_ptr + row, (chosen * WIDTH + chosen_column).to(tl.int64))
    if LOG_PROBS:
        own = tl.sum(tl.where(column == chosen_column, own, 0.0))
        sampled = tl.sum(tl.where(column == chosen_column, z, 0.0))
        tl.store(own_ptr + row, own - own_peak - tl.log(own_total))
        tl.store(sampled_ptr + row, sampled - peak - tl.log(total.to(tl.float32)))


@triton.jit
def _finite(x):
    """For differences of infinite logits of bits, as in the reference."""
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@kernel(do_not_specialize=["count", "position", "rows"])
def sample_bits_fwd_kernel(
    logits_ptr, others_ptr, seeds_ptr, bits_ptr, own_ptr, sampled_ptr,
    logits_b, logits_n, logits_v, others_b, others_n, others_v, seeds_b, rows, count, position,
    gain, guidance, temperature, cutoff,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
    LOG_PROBS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, WIDTH)[None, :]
    valid = row < rows
    seen = valid & (column < D)
    b, i = (row // count).to(tl.int64), (row % count).to(tl.int64)
    own = tl.load(logits_ptr + b * logits_b + i * logits_n + column.to(tl.int64) * logits_v, seen, 0.0).to(tl.float32)
    z = own
    if GUIDED:
        others = others_ptr + b * others_b + i * others_n + column.to(tl.int64) * others_v
        z = _finite(own) * gain - _finite(tl.load(others, seen, 0.0).to(tl.float32)) * guidance
    if TEMPERED:
        z, own = tl.div_rn(z, temperature), tl.div_rn(own, temperature)
    certain = (tl.abs(z) >= cutoff) & (z != 0)
    draw = uniform(tl.load(seeds_ptr + b * seeds_b, valid, 0), STREAM, (position + i) * D + column)  # [ROWS, WIDTH]
    one = tl.where(certain, z > 0, draw >= 1 / (1 + tl.exp(z)))
    tl.store(bits_ptr + row.to(tl.int64) * D + column, one, seen)
    if LOG_PROBS:
        sign = tl.where(one, 1.0, -1.0)
        own = tl.sum(tl.where(seen, _log_sigmoid(sign * own), 0.0), 1)[:, None]
        sampled = tl.sum(tl.where(seen & ~certain, _log_sigmoid(sign * z), 0.0), 1)[:, None]
        tl.store(own_ptr + row, own, valid)
        tl.store(sampled_ptr + row, sampled, valid)


def tokens(call: SampleCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    batch, count, size = call.logits.shape
    drawn = torch.empty(batch, count, dtype=torch.int64, device=call.logits.device)
    own, sampled = _scores_like(call)
    if drawn.numel():
        block = max(power_of_2(size), 32)
        tile = tiles.TOKENS.choose(card(call.logits.device), vocabulary=block)
        sample_tokens_fwd_kernel[(batch * count,)](
            *_arguments(call, drawn, own, sampled), count, call.position, *_settings(call), call.top_k, 1 - call.top_p,
            V=size, BLOCKS=max(block // tile["WIDTH"], 1), WIDTH=min(block, tile["WIDTH"]), **_flags(call),
            ONE=call.top_k == 1 or size == 1, FEW=1 < call.top_k < size, SHARE=0 < call.top_p < 1,
            num_warps=tile["num_warps"], maxnreg=tile["maxnreg"], enable_fp_fusion=False,
        )  # fmt: skip
    return drawn, own, sampled


def bits(call: SampleCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    (batch, count, size), top_p = call.logits.shape, call.top_p
    drawn = torch.empty(batch, count, size, dtype=torch.bool, device=call.logits.device)
    own, sampled = _scores_like(call)
    if drawn.numel():
        cutoff = 0.0 if call.top_k == 1 else math.log(top_p / (1 - top_p)) if 0 < top_p < 1 else math.inf
        width = power_of_2(size)
        tile = tiles.BITS.choose(card(call.logits.device))
        rows = max(1, tile["TILE"] // width)
        sample_bits_fwd_kernel[(cdiv(batch * count, rows),)](
            *_arguments(call, drawn, own, sampled), batch * count, count, call.position, *_settings(call), cutoff,
            D=size, ROWS=rows, WIDTH=width, **_flags(call), num_warps=tile["num_warps"], enable_fp_fusion=False,
        )  # fmt: skip
    return drawn, own, sampled


def _scores_like(call: SampleCall) -> list[torch.Tensor]:
    shape = call.logits.shape[:2] if call.log_probs else (0,)
    return [torch.empty(shape, dtype=torch.float32, device=call.logits.device) for _ in range(2)]


def _arguments(call: SampleCall, *results: torch.Tensor) -> tuple[object, ...]:
    """The tensors of a launch and the inputs' strides."""
    strides = (0, 0, 0) if call.unconditional is None else call.unconditional.stride()
    given = (call.logits, call.unconditional, call.seeds)
    return *given, *results, *call.logits.stride(), *strides, call.seeds.stride(0)


def _settings(call: SampleCall) -> tuple[float, float, float]:
    return float(1 + call.guidance), float(call.guidance), float(call.temperature)


def _flags(call: SampleCall) -> dict[str, bool]:
    guided = call.unconditional is not None and call.guidance != 0
    return {"GUIDED": guided, "TEMPERED": call.temperature != 1, "LOG_PROBS": call.log_probs}
