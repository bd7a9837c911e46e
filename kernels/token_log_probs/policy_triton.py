"""The clipped policy objective in Triton: shares of the tokens, which depend on masks alone, and what is measured.

A program takes one scale of one sample; what it sums it writes, and a later launch adds that up in a fixed order. The
formulas are those of policy.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import power_of_2
from fastvar.kernels.token_log_probs.policy import factors

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.policy_loss import PolicyLossCall

BLOCK = 512  # tokens at a time
SAMPLES = 32  # at a time, where sums over the batch are added up


@triton.jit
def surrogate(ratio, gain, trained, low, high):
    """min(r A, clip(r) A), its derivative by the logarithm of the ratio, and whether the clip holds the ratio. Where
    the advantage is 0 or nothing is trained the first two are 0, whatever the ratio is."""
    product = ratio * gain
    value = tl.minimum(product, tl.minimum(tl.maximum(ratio, low), high) * gain)
    value = tl.where(product == product, value, product)  # a minimum may drop NaN
    held = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))
    moves = trained & (gain != 0)
    return tl.where(moves, value, 0.0), tl.where(moves & (held == 0), product, 0.0), trained & held


@triton.jit
def estimate(gap, ESTIMATOR: tl.constexpr):
    """The KL estimate from g = l^ref - l, and minus its derivative by g. For k3 exp(g) - 1 - g and exp(g) - 1; near 0,
    where differences would cancel, by a series."""
    if ESTIMATOR == "k2":
        return gap * gap * 0.5, gap
    else:
        series = 1.0 + gap * (1 / 9)
        for i in tl.static_range(6):
            series = 1.0 + gap * series * (1 / (8 - i))
        series = gap * gap * 0.5 * series
        grown = tl.exp(gap) - 1.0
        near = tl.abs(gap) < 0.5
        return tl.where(near, series, grown - gap), tl.where(near, series + gap, grown)


@triton.jit
def _place(end_ptr, K: tl.constexpr):
    """The sample and the scale of a program, first token of the scale and the one after its last."""
    program = tl.program_id(0)
    b, k = program // K, program % K
    return b.to(tl.int64), k, tl.load(end_ptr + k - 1, k > 0, 0), tl.load(end_ptr + k)


@triton.jit
def _mask(mask_ptr, at, valid, k, first_scale):
    """How much tokens are trained, 0..1."""
    mask = tl.where(valid, 1.0, 0.0)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + at, valid, 0.0).to(tl.float32)
    return tl.where(k >= first_scale, mask, 0.0)


@triton.jit
def _log_ratio(log_prob_ptr, old_ptr, at, trained):
    """The log-ratio of the trained tokens; 0 on-policy."""
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
        total += tl.sum(tl.load(ptr + b.to(tl.int64) * K + k, (b < B) & (k < K), 0.0), 0)
    return total


@kernel
def policy_loss_fwd_mask_sums_kernel(mask_ptr, end_ptr, span_ptr, L, first_scale, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the mask over a scale of a sample: span_ptr (B, K)."""
    b, k, begin, end = _place(end_ptr, K)
    masks = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        masks += _mask(mask_ptr, b * L + token, token < end, k, first_scale)
    tl.store(span_ptr + b * K + k, tl.sum(masks, 0))


@kernel
def policy_loss_fwd_shares_kernel(
    mask_ptr, end_ptr, span_ptr, total_ptr, factor_ptr, weight_ptr, share_ptr, B, L, first_scale,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, NORMALISATION: tl.constexpr,
):  # fmt: skip
    """Shares of the tokens in the loss: share_ptr (B, L). The weight of a token of each scale that is wholly trained,
    and what all is divided by: weight_ptr (K + 1), which every program computes for itself."""
    scales = tl.arange(0, BLOCK_K)
    weights = tl.load(factor_ptr + scales, scales < K, 0.0)
    if total_ptr is None:
        total = _over_batch(span_ptr, B, K, BLOCK_K, SAMPLES)
    else:
        total = tl.where(scales >= first_scale, tl.load(total_ptr + scales, scales < K, 0.0).to(tl.float32), 0.0)
    if NORMALISATION == "per_scale":
        normalisation = tl.sum(tl.where(total > 0, weights, 0.0), 0)
        weights = _divide(weights, total)
    elif NORMALISATION == "none":
        normalisation = tl.sum(total, 0)
    else:
        normalisation = tl.sum(weights * total, 0)
    if tl.program_id(0) == 0:
        tl.store(weight_ptr + scales, weights, scales < K)
        tl.store(weight_ptr + K, normalisation)
    b, k, begin, end = _place(end_ptr, K)
    weight = tl.sum(tl.where(scales == k, weights, 0.0), 0)
    for start in range(begin, tl.where(b < B, end, begin), BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = _mask(mask_ptr, b * L + token, token < end, k, first_scale)
        tl.store(share_ptr + b * L + token, _divide(mask * weight, normalisation), token < end)


@kernel
def policy_loss_fwd_ratio_sums_kernel(
    log_prob_ptr, old_ptr, mask_ptr, end_ptr, ratio_ptr, L, first_scale, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of the mask times the log-ratio over a scale of a sample: ratio_ptr (B, K)."""
    b, k, begin, end = _place(end_ptr, K)
    ratios = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = _mask(mask_ptr, b * L + token, token < end, k, first_scale)
        ratios += mask * _log_ratio(log_prob_ptr, old_ptr, b * L + token, mask > 0)
    tl.store(ratio_ptr + b * K + k, tl.sum(ratios, 0))


@kernel
def policy_loss_fwd_terms_kernel(
    log_prob_ptr, entropy_ptr, exact_kl_ptr, old_ptr, reference_ptr, advantage_ptr, mask_ptr,
    end_ptr, span_ptr, ratio_ptr, weight_ptr, slope_ptr, sum_ptr,
    B, L, first_scale, low, high, kl_weight, entropy_weight,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, LEVEL: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """Sums over a scale of a sample: sum_ptr (6, B, K); slopes of the tokens (B, L), if asked for."""
    b, k, begin, end = _place(end_ptr, K)
    weight, normalisation = tl.load(weight_ptr + k), tl.load(weight_ptr + K)
    if LEVEL != "token":
        # of a ratio of many tokens each has its share of all their slopes
        scales = tl.arange(0, BLOCK_K)
        within = scales < K
        if LEVEL == "scale":
            within = scales == k
        span_mask = tl.load(span_ptr + b * K + scales, within, 0.0)
        weights = tl.load(weight_ptr + scales, within, 0.0)
        shared = _divide(_divide(tl.sum(weights * span_mask, 0), tl.sum(span_mask, 0)), normalisation)
        log_ratio = tl.sum(tl.load(ratio_ptr + b * K + scales, within, 0.0), 0)
        mean_ratio = _divide(log_ratio, tl.sum(span_mask, 0))
    gain = tl.load(advantage_ptr + b).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    costs = tl.zeros((BLOCK,), tl.float32)
    kls = tl.zeros((BLOCK,), tl.float32)
    clips = tl.zeros((BLOCK,), tl.float32)
    entropies = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = b * L + token
        mask = _mask(mask_ptr, at, token < end, k, first_scale)
        trained = mask > 0
        share = _divide(mask * weight, normalisation)
        if LEVEL == "token":
            ratio = tl.exp(_log_ratio(log_prob_ptr, old_ptr, at, trained))
        else:
            ratio = tl.exp(mean_ratio + tl.zeros((BLOCK,), tl.float32))
        won, push, clipped = surrogate(ratio, gain, trained, low, high)
        slope = -share * push
        if LEVEL != "token":
            slope = -mask * shared * push
        cost = -won
        if exact_kl_ptr is not None:
            kl = tl.where(trained, tl.load(exact_kl_ptr + at, trained, 0.0), 0.0)
            cost += tl.where(kl_weight != 0, kl_weight * kl, 0.0)
            kls += mask * kl
        elif reference_ptr is not None:
            other = tl.load(reference_ptr + at, trained, 0.0).to(tl.float32)
            gap = tl.where(trained, other - tl.load(log_prob_ptr + at, trained, 0.0), 0.0)
            kl, kl_slope = estimate(gap, ESTIMATOR)
            slope -= tl.where(kl_weight != 0, kl_weight * share * kl_slope, 0.0)
            cost += tl.where(kl_weight != 0, kl_weight * kl, 0.0)
            kls += mask * kl
        entropy = tl.where(trained, tl.load(entropy_ptr + at, trained, 0.0), 0.0)
        cost -= tl.where(entropy_weight != 0, entropy_weight * entropy, 0.0)
        if slope_ptr is not None:
            tl.store(slope_ptr + at, slope, token < end)
        costs += tl.where(trained, mask * weight * cost, 0.0)
        clips += tl.where(clipped, mask, 0.0)
        entropies += mask * entropy
        ratios += tl.where(trained, mask * ratio, 0.0)
        squares += slope * slope
    size = tl.cast(B, tl.int64) * K
    at = sum_ptr + b * K + k
    tl.store(at, tl.sum(costs, 0))
    tl.store(at + size, tl.sum(kls, 0))
    tl.store(at + 2 * size, tl.sum(clips, 0))
    tl.store(at + 3 * size, tl.sum(entropies, 0))
    tl.store(at + 4 * size, tl.sum(ratios, 0))
    tl.store(at + 5 * size, tl.sum(squares, 0))


@kernel
def policy_loss_fwd_results_kernel(
    weight_ptr, span_ptr, sum_ptr,
    loss_ptr, kl_ptr, clip_ptr, entropy_ptr, ratio_ptr, share_ptr, scale_entropy_ptr, scale_ratio_ptr, B,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    size = tl.cast(B, tl.int64) * K
    norm = tl.sqrt(_over_batch(sum_ptr + 5 * size, B, K, BLOCK_K, SAMPLES))
    tl.store(share_ptr + k, _divide(norm, tl.sum(norm, 0)), k < K)
    trained = _over_batch(span_ptr, B, K, BLOCK_K, SAMPLES)
    tokens = tl.sum(trained, 0)
    cost = _over_batch(sum_ptr, B, K, BLOCK_K, SAMPLES)
    kl = _over_batch(sum_ptr + size, B, K, BLOCK_K, SAMPLES)
    clip = _over_batch(sum_ptr + 2 * size, B, K, BLOCK_K, SAMPLES)
    entropy = _over_batch(sum_ptr + 3 * size, B, K, BLOCK_K, SAMPLES)
    ratio = _over_batch(sum_ptr + 4 * size, B, K, BLOCK_K, SAMPLES)
    tl.store(loss_ptr, _divide(tl.sum(cost, 0), tl.load(weight_ptr + K)))
    tl.store(kl_ptr, _divide(tl.sum(kl, 0), tokens))
    tl.store(clip_ptr, _divide(tl.sum(clip, 0), tokens))
    tl.store(entropy_ptr, _divide(tl.sum(entropy, 0), tokens))
    tl.store(ratio_ptr, _divide(tl.sum(ratio, 0), tokens))
    tl.store(scale_entropy_ptr + k, _divide(entropy, trained), k < K)
    tl.store(scale_ratio_ptr + k, _divide(ratio, trained), k < K)


class Policy:
    """The settings and tensors of a call, with the tokens' shares: all that is known before the log-probabilities.

    Attributes:
        share: (B, L).
        low, high: bounds of the ratio.
    """

    def __init__(self, call: PolicyLossCall) -> None:
        options, grids, device = call.options, call.schedule, call.tokens.device
        self.batch, self.length = call.tokens.shape[:2]
        tensors = (call.old_log_probs, call.reference_log_probs, call.token_mask, call.mask_totals)
        self.old, self.reference, self.mask, totals = (None if t is None else t.contiguous() for t in tensors)
        self.advantages, self.first_scale = call.advantages.contiguous(), call.first_scale
        self.low, self.high = 1.0 - options.clip_low, 1.0 + options.clip_high
        self.level, self.estimator = options.ratio_level, options.kl_estimator
        self.kl_weight, self.entropy_weight = float(options.kl_weight), float(options.entropy_weight)
        self.scales, self.device, self.ends = len(grids), device, _ends(grids, device)
        self.constants = {"K": self.scales, "BLOCK_K": power_of_2(self.scales)}
        self.share = self._empty(self.batch, self.length)
        self._spans, self._weights = self._empty(self.batch, self.scales), self._empty(self.scales + 1)
        if self.batch:
            policy_loss_fwd_mask_sums_kernel[self._grid](
                self.mask, self.ends, self._spans, self.length, self.first_scale, K=self.scales, BLOCK=BLOCK
            )
        policy_loss_fwd_shares_kernel[(max(self.batch * self.scales, 1),)](
            self.mask, self.ends, self._spans, totals, factors(grids, options.panw_alpha, torch.float32, device),
            self._weights, self.share, self.batch, self.length, self.first_scale, BLOCK=BLOCK, SAMPLES=SAMPLES,
            NORMALISATION=options.panw_normalisation, **self.constants,
        )  # fmt: skip

    @property
    def _grid(self) -> tuple[int]:
        return (self.batch * self.scales,)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def measure(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, exact_kl: torch.Tensor | None, slope: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The first eight results of `policy.terms`; the slopes (B, L) are written if there is room for them."""
        measured = [self._empty(*shape) for shape in (*[()] * 5, *[(self.scales,)] * 3)]
        sums = self._empty(6, self.batch, self.scales)
        ratios = None
        if self.batch and self.level != "token":
            ratios = self._empty(self.batch, self.scales)
            policy_loss_fwd_ratio_sums_kernel[self._grid](
                log_probs, self.old, self.mask, self.ends, ratios, self.length, self.first_scale, K=self.scales,
                BLOCK=BLOCK,
            )  # fmt: skip
        if self.batch:
            policy_loss_fwd_terms_kernel[self._grid](
                log_probs, entropy, exact_kl, self.old, self.reference, self.advantages, self.mask, self.ends,
                self._spans, ratios, self._weights, slope, sums, self.batch, self.length, self.first_scale,
                self.low, self.high, self.kl_weight, self.entropy_weight, BLOCK=BLOCK, LEVEL=self.level,
                ESTIMATOR=self.estimator, **self.constants,
            )  # fmt: skip
        policy_loss_fwd_results_kernel[(1,)](
            self._weights, self._spans, sums, *measured, self.batch, SAMPLES=SAMPLES, **self.constants
        )
        return measured


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def _ends(schedule: ScaleSchedule, device: torch.device) -> torch.Tensor:
    """The scales' ends (K,), made once: no copy to the device later, during the capture of a graph."""
    return torch.tensor(schedule.ends, dtype=torch.int32, device=device)
