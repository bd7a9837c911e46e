"""The clipped policy objective in Triton, in three launches: sums that all tokens need, the tokens, the results.

In the first two a program takes one scale of one sample; what it sums it writes, and the next launch adds that up in a
fixed order. The formulas are the reference's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.policy_loss.reference import backward as backward

from fastvar.schedule import ScaleSchedule

BLOCK = 512  # tokens at a time
SAMPLES = 32  # at a time, where sums over the batch are added up


@triton.jit
def _range(end_ptr, k):
    """First token of a scale and the one after its last."""
    return tl.load(end_ptr + k - 1, k > 0, 0), tl.load(end_ptr + k)


@triton.jit
def _mask(mask_ptr, at, valid, k, first_scale):
    """How much tokens are trained, 0..1."""
    mask = tl.where(valid, 1.0, 0.0)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + at, valid, 0.0).to(tl.float32)
    return tl.where(k >= first_scale, mask, 0.0)


@triton.jit
def _log_ratio(log_prob_ptr, old_ptr, at, trained):
    """Of the trained tokens; 0 on-policy."""
    if old_ptr is None:
        return tl.where(trained, 0.0, 0.0)
    else:
        now, old = tl.load(log_prob_ptr + at, trained, 0.0), tl.load(old_ptr + at, trained, 0.0)
        return tl.where(trained, now - old.to(tl.float32), 0.0)


@triton.jit
def _divide(value, total):
    """value / total, and 0 where the total is 0: nothing was trained there."""
    return tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _over_batch(ptr, B, K: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr):
    """Sums (BLOCK_K) over the samples of (B, K)."""
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, B, SAMPLES):
        b = start + tl.arange(0, SAMPLES)[:, None]
        total += tl.sum(tl.load(ptr + b * K + k, (b < B) & (k < K), 0.0), 0)
    return total


@triton.jit
def _weights(
    span_ptr, total_ptr, factor_ptr, B, first_scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, NORMALISATION: tl.constexpr,
):  # fmt: skip
    """Of each scale the weight of a token that is wholly trained (BLOCK_K), and what all is divided by."""
    k = tl.arange(0, BLOCK_K)
    factor = tl.load(factor_ptr + k, k < K, 0.0)
    if total_ptr is None:
        total = _over_batch(span_ptr, B, K, BLOCK_K, SAMPLES)
    else:
        total = tl.where(k >= first_scale, tl.load(total_ptr + k, k < K, 0.0).to(tl.float32), 0.0)
    if NORMALISATION == "per_scale":
        return _divide(factor, total), tl.sum(tl.where(total > 0, factor, 0.0), 0)
    elif NORMALISATION == "none":
        return factor, tl.sum(total, 0)
    else:
        return factor, tl.sum(factor * total, 0)


@triton.jit
def _spans(
    log_prob_ptr, old_ptr, mask_ptr, end_ptr, span_ptr, L, first_scale, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of the mask and of the mask times the log-ratio: span_ptr (2, B, K)."""
    k, b = tl.program_id(0), tl.program_id(1)
    begin, end = _range(end_ptr, k)
    masks = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = b.to(tl.int64) * L + token
        mask = _mask(mask_ptr, at, token < end, k, first_scale)
        masks += mask
        ratios += mask * _log_ratio(log_prob_ptr, old_ptr, at, mask > 0)
    tl.store(span_ptr + b * K + k, tl.sum(masks, 0))
    tl.store(span_ptr + (tl.num_programs(1) + b) * K + k, tl.sum(ratios, 0))


@triton.jit
def _estimate(gap):
    """exp(gap) - 1 - gap and exp(gap) - 1; near 0, where differences would cancel, by a series."""
    series = 1.0 + gap * (1 / 9)
    for i in tl.static_range(6):
        series = 1.0 + gap * series * (1 / (8 - i))
    series = gap * gap * 0.5 * series
    grown = tl.exp(gap) - 1.0
    near = tl.abs(gap) < 0.5
    return tl.where(near, series, grown - gap), tl.where(near, series + gap, grown)


@triton.jit
def _tokens(
    log_prob_ptr, entropy_ptr, exact_kl_ptr, old_ptr, reference_ptr, advantage_ptr, mask_ptr, total_ptr,
    end_ptr, factor_ptr, span_ptr, slope_ptr, share_ptr, sum_ptr,
    L, first_scale, low, high, kl_weight, entropy_weight,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr,
    NORMALISATION: tl.constexpr, LEVEL: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """Slopes and shares of the tokens (B, L), and sums of a scale of a sample: sum_ptr (6, B, K)."""
    k, b = tl.program_id(0), tl.program_id(1)
    B = tl.num_programs(1)
    weights, normalisation = _weights(
        span_ptr, total_ptr, factor_ptr, B, first_scale, K, BLOCK_K, SAMPLES, NORMALISATION
    )
    scales = tl.arange(0, BLOCK_K)
    weight = tl.sum(tl.where(scales == k, weights, 0.0), 0)
    span_mask = tl.load(span_ptr + b * K + scales, scales < K, 0.0)
    span_ratio = tl.load(span_ptr + (B + b) * K + scales, scales < K, 0.0)
    if LEVEL == "scale":
        span_mask = tl.where(scales == k, span_mask, 0.0)
        span_ratio = tl.where(scales == k, span_ratio, 0.0)
    # of a ratio of many tokens each has its share of all their slopes
    shared = _divide(_divide(tl.sum(weights * span_mask, 0), tl.sum(span_mask, 0)), normalisation)
    mean_ratio = _divide(tl.sum(span_ratio, 0), tl.sum(span_mask, 0))
    gain = tl.load(advantage_ptr + b).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    begin, end = _range(end_ptr, k)
    costs = tl.zeros((BLOCK,), tl.float32)
    kls = tl.zeros((BLOCK,), tl.float32)
    clips = tl.zeros((BLOCK,), tl.float32)
    entropies = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = token < end
        at = b.to(tl.int64) * L + token
        mask = _mask(mask_ptr, at, valid, k, first_scale)
        trained = mask > 0
        share = _divide(mask * weight, normalisation)
        if LEVEL == "token":
            ratio = tl.exp(_log_ratio(log_prob_ptr, old_ptr, at, trained))
        else:
            ratio = tl.exp(mean_ratio + tl.zeros((BLOCK,), tl.float32))
        product = ratio * gain
        surrogate = tl.minimum(product, tl.minimum(tl.maximum(ratio, low), high) * gain)
        surrogate = tl.where(product == product, surrogate, product)  # a minimum may drop NaN
        clipped = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))
        push = tl.where(clipped, 0.0, ratio * gain)
        slope = -share * push
        if LEVEL != "token":
            slope = -mask * shared * push
        cost = -surrogate
        if exact_kl_ptr is not None:
            kl = tl.where(trained, tl.load(exact_kl_ptr + at, trained, 0.0), 0.0)
            cost += tl.where(kl_weight != 0, kl_weight * kl, 0.0)
            kls += mask * kl
        elif reference_ptr is not None:
            other = tl.load(reference_ptr + at, trained, 0.0).to(tl.float32)
            gap = tl.where(trained, other - tl.load(log_prob_ptr + at, trained, 0.0), 0.0)
            if ESTIMATOR == "k2":
                kl, kl_slope = gap * gap * 0.5, -gap
            else:
                kl, grown = _estimate(gap)
                kl_slope = -grown
            slope += tl.where(kl_weight != 0, kl_weight * share * kl_slope, 0.0)
            cost += tl.where(kl_weight != 0, kl_weight * kl, 0.0)
            kls += mask * kl
        entropy = tl.where(trained, tl.load(entropy_ptr + at, trained, 0.0), 0.0)
        cost -= tl.where(entropy_weight != 0, entropy_weight * entropy, 0.0)
        tl.store(slope_ptr + at, slope, valid)
        tl.store(share_ptr + at, share, valid)
        costs += mask * weight * cost
        clips += tl.where(clipped, mask, 0.0)
        entropies += mask * entropy
        ratios += tl.where(trained, mask * ratio, 0.0)
        squares += slope * slope
    at = sum_ptr + b * K + k
    tl.store(at, tl.sum(costs, 0))
    tl.store(at + B * K, tl.sum(kls, 0))
    tl.store(at + 2 * B * K, tl.sum(clips, 0))
    tl.store(at + 3 * B * K, tl.sum(entropies, 0))
    tl.store(at + 4 * B * K, tl.sum(ratios, 0))
    tl.store(at + 5 * B * K, tl.sum(squares, 0))


@triton.jit
def _results(
    total_ptr, factor_ptr, span_ptr, sum_ptr,
    loss_ptr, kl_ptr, clip_ptr, entropy_ptr, ratio_ptr, share_ptr, scale_entropy_ptr, scale_ratio_ptr, B, first_scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, NORMALISATION: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    _, normalisation = _weights(span_ptr, total_ptr, factor_ptr, B, first_scale, K, BLOCK_K, SAMPLES, NORMALISATION)
    trained = _over_batch(span_ptr, B, K, BLOCK_K, SAMPLES)
    tokens = tl.sum(trained, 0)
    cost = _over_batch(sum_ptr, B, K, BLOCK_K, SAMPLES)
    kl = _over_batch(sum_ptr + B * K, B, K, BLOCK_K, SAMPLES)
    clip = _over_batch(sum_ptr + 2 * B * K, B, K, BLOCK_K, SAMPLES)
    entropy = _over_batch(sum_ptr + 3 * B * K, B, K, BLOCK_K, SAMPLES)
    ratio = _over_batch(sum_ptr + 4 * B * K, B, K, BLOCK_K, SAMPLES)
    norm = tl.sqrt(_over_batch(sum_ptr + 5 * B * K, B, K, BLOCK_K, SAMPLES))
    tl.store(loss_ptr, _divide(tl.sum(cost, 0), normalisation))
    tl.store(kl_ptr, _divide(tl.sum(kl, 0), tokens))
    tl.store(clip_ptr, _divide(tl.sum(clip, 0), tokens))
    tl.store(entropy_ptr, _divide(tl.sum(entropy, 0), tokens))
    tl.store(ratio_ptr, _divide(tl.sum(ratio, 0), tokens))
    tl.store(share_ptr + k, _divide(norm, tl.sum(norm, 0)), k < K)
    tl.store(scale_entropy_ptr + k, _divide(entropy, trained), k < K)
    tl.store(scale_ratio_ptr + k, _divide(ratio, trained), k < K)


def forward(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    exact_kl: torch.Tensor | None,
    old_log_probs: torch.Tensor | None,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    token_mask: torch.Tensor | None,
    mask_totals: torch.Tensor | None,
    grids: ScaleSchedule,
    first_scale: int,
    panw_alpha: float,
    panw_normalisation: str,
    clip_low: float,
    clip_high: float,
    ratio_level: str,
    kl_weight: float,
    kl_estimator: str,
    entropy_weight: float,
) -> tuple[torch.Tensor, ...]:
    """See the reference."""
    batch, length = log_probs.shape
    scales = len(grids)
    like: dict[str, Any] = {"dtype": torch.float32, "device": log_probs.device}
    measured = [torch.empty(shape, **like) for shape in (*[()] * 5, *[(scales,)] * 3)]
    slope, share = torch.empty(batch, length, **like), torch.empty(batch, length, **like)
    spans, sums = torch.empty(2, batch, scales, **like), torch.empty(6, batch, scales, **like)
    ends, factors = _tables(grids, panw_alpha, log_probs.device)
    constants = {"K": scales, "BLOCK_K": triton.next_power_of_2(scales), "SAMPLES": SAMPLES}
    log_probs, entropy, advantages = log_probs.contiguous(), entropy.contiguous(), advantages.contiguous()
    exact_kl, old_log_probs, reference_log_probs, token_mask, mask_totals = (
        None if t is None else t.contiguous()
        for t in (exact_kl, old_log_probs, reference_log_probs, token_mask, mask_totals)
    )
    if batch:
        grid = (scales, batch)
        _spans[grid](log_probs, old_log_probs, token_mask, ends, spans, length, first_scale, K=scales, BLOCK=BLOCK)
        _tokens[grid](
            log_probs, entropy, exact_kl, old_log_probs, reference_log_probs, advantages, token_mask, mask_totals,
            ends, factors, spans, slope, share, sums,
            length, first_scale, 1.0 - clip_low, 1.0 + clip_high, float(kl_weight), float(entropy_weight), BLOCK=BLOCK,
            NORMALISATION=panw_normalisation, LEVEL=ratio_level, ESTIMATOR=kl_estimator, **constants,
        )  # fmt: skip
    _results[(1,)](
        mask_totals, factors, spans, sums, *measured, batch, first_scale, NORMALISATION=panw_normalisation, **constants
    )
    return (*measured, slope, share)


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def _tables(schedule: ScaleSchedule, alpha: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales' ends and weights (K,), made once: no copy to the device later, during the capture of a graph."""
    factors = [float(h * w) ** -alpha for h, w in schedule]
    return (
        torch.tensor(schedule.ends, dtype=torch.int32, device=device),
        torch.tensor(factors, dtype=torch.float32, device=device),
    )
