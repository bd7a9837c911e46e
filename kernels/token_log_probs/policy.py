"""The clipped policy objective on log-probabilities, in plain PyTorch, with its gradient written out.

Per token i of sample b, with m_i the mask, k_t = (h_t w_t)^-alpha and D the normalisation:

    loss = sum_i w_i (beta kl_i - s_i - gamma H_i) / D      s_i = min(r_i A_b, clip(r_i) A_b)

w_i = m_i k_t and D = sum w ("per_segment") or D = sum m ("none"); "per_scale" takes each scale's mean and weighs those
with k_t: w_i = m_i k_t / (sum of m in the scale), D = sum of k_t over the scales that have tokens. The share w_i / D
depends on the masks alone. Where the advantage or the mask is 0, s_i is 0 whatever the ratio is, infinite too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.policy_loss import PolicyLossCall, PolicyLossOptions


def terms(
    log_probs: torch.Tensor, entropy: torch.Tensor, exact_kl: torch.Tensor | None, call: PolicyLossCall
) -> tuple[torch.Tensor, ...]:
    """loss, kl, clip fraction, entropy, ratio, scalars; gradient share, entropy and ratio of each scale (K,); for the
    gradient d loss / d log_probs without the exact KL and w / D of each token (B, L)."""
    options, grids = call.options, call.schedule
    kl_weight, entropy_weight = options.kl_weight, options.entropy_weight
    low, high = _bounds(options)
    lengths = grids.lengths
    mask, weight, total = _weights(call, log_probs)
    trained, share = mask > 0, _divide(weight, total)

    def only_trained(values: torch.Tensor) -> torch.Tensor:
        return torch.where(trained, values, 0)  # whatever stands at other tokens, NaN included, has no effect

    if call.old_log_probs is None:  # on-policy
        log_ratio = torch.zeros_like(log_probs)
    else:
        log_ratio = only_trained(log_probs - call.old_log_probs.to(log_probs.dtype))
    spans = {"token": None, "scale": lengths, "sample": (sum(lengths),)}[options.ratio_level]
    if spans is not None:
        log_ratio = _spread(_divide(_sums(mask * log_ratio, spans), _sums(mask, spans)), spans)
    ratio = log_ratio.exp()
    gain = call.advantages.to(log_probs.dtype)[:, None]  # [B, 1]
    moves = trained & (gain != 0)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
    clipped = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))

    # d s / d log_ratio; for a ratio of many tokens, each of them has its share of all their slopes
    slope = -share * torch.where(moves & ~clipped, ratio * gain, 0)
    if spans is not None:
        slope = mask * _spread(_divide(_sums(slope, spans), _sums(mask, spans)), spans)

    kl = None
    kl_slope = None
    if exact_kl is not None:
        kl = only_trained(exact_kl)
    elif call.reference_log_probs is not None:
        gap = only_trained(call.reference_log_probs.to(log_probs.dtype) - log_probs)
        if options.kl_estimator == "k2":
            kl, kl_slope = gap.square() / 2, -gap
        else:
            kl, kl_slope = gap.expm1() - gap, -gap.expm1()

    cost = -torch.where(moves, surrogate, 0)
    if kl_weight != 0 and kl is not None:
        cost = cost + kl_weight * kl
        if kl_slope is not None:
            slope = slope + kl_weight * share * kl_slope
    if entropy_weight != 0:
        cost = cost - entropy_weight * only_trained(entropy)

    def sums(values: torch.Tensor) -> torch.Tensor:  # [K], of the trained tokens
        return _sums(mask * only_trained(values), lengths).sum(0)

    norms = torch.stack([part.square().sum().sqrt() for part in slope.split(lengths, 1)])
    tokens, entropies, ratios = _sums(mask, lengths).sum(0), sums(entropy), sums(ratio)
    count = tokens.sum()
    loss = _divide((weight * cost).sum(), total)
    return (
        loss,
        torch.zeros_like(loss) if kl is None else _divide(sums(kl).sum(), count),
        _divide(sums(clipped.to(entropy.dtype)).sum(), count),
        _divide(entropies.sum(), count),
        _divide(ratios.sum(), count),
        _divide(norms, norms.sum()),
        _divide(entropies, tokens),
        _divide(ratios, tokens),
        slope,
        share,
    )


def incoming(call: PolicyLossCall, like: torch.Tensor) -> Callable[..., list[torch.Tensor | None]]:
    """Gradients of the loss with respect to log-probabilities, entropies and the exact KL, as a function of some of all
    tokens (B L) and of these results there. Only where a ratio is one token's."""
    options, (low, high) = call.options, _bounds(call.options)
    mask, weight, total = _weights(call, like)
    share, trained = _divide(weight, total).flatten(), mask.flatten() > 0
    squared = options.kl_estimator == "k2"
    gain = call.advantages.to(like.dtype).repeat_interleave(like.shape[1], output_size=like.numel())
    old, reference = (
        None if each is None else each.to(like.dtype).flatten()
        for each in (call.old_log_probs, call.reference_log_probs)
    )

    def gradients(rows: slice, results: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        log_probs, _, kl = results
        assert log_probs is not None
        push, here = gain[rows], trained[rows]
        held = torch.zeros_like(here)
        if old is not None:
            ratio = torch.where(here, log_probs - old[rows], 0).exp()
            held = ((push > 0) & (ratio > high)) | ((push < 0) & (ratio < low))
            push = push * ratio
        slope = torch.where(here & (gain[rows] != 0) & ~held, -push, 0)
        if reference is not None and options.kl_weight != 0:
            gap = torch.where(here, reference[rows] - log_probs, 0)
            slope = slope - options.kl_weight * (gap if squared else gap.expm1())
        of_entropy = -options.entropy_weight * share[rows] if options.entropy_weight != 0 else None
        of_kl = options.kl_weight * share[rows] if kl is not None and options.kl_weight != 0 else None
        return [share[rows] * slope, of_entropy, of_kl, None]

    return gradients


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def factors(grids: ScaleSchedule, alpha: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """k_t of the scales (K,), made once: a copy to the device on every call would wait for it."""
    return torch.tensor([float(h * w) ** -alpha for h, w in grids], dtype=dtype, device=device)


def _bounds(options: PolicyLossOptions) -> tuple[float, float]:
    """Of the ratio."""
    return 1 - options.clip_low, 1 + options.clip_high


def _weights(call: PolicyLossCall, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m (B, L), w (B, L) and D ()."""
    grids, normalisation = call.schedule, call.options.panw_normalisation
    mask = torch.ones_like(like)
    if call.token_mask is not None:
        mask.copy_(call.token_mask)
    mask[:, : grids.starts[call.first_scale]].zero_()
    if call.mask_totals is None:
        totals = _sums(mask, grids.lengths).sum(0)
    else:  # of the whole batch
        totals = call.mask_totals.to(mask.dtype, copy=True)
        totals[: call.first_scale].zero_()
    factor = factors(grids, call.options.panw_alpha, mask.dtype, mask.device)
    if normalisation == "per_scale":
        weight, total = _divide(factor, totals), (factor * (totals > 0)).sum()
    elif normalisation == "none":
        weight, total = factor, totals.sum()
    else:
        weight, total = factor, (factor * totals).sum()
    return mask, mask * _spread(weight[None], grids.lengths), total


def _sums(values: torch.Tensor, spans: Sequence[int]) -> torch.Tensor:
    """(B, L) to (B, len(spans)): sums over consecutive spans of tokens."""
    return torch.stack([part.sum(1) for part in values.split(spans, 1)], 1)


def _spread(values: torch.Tensor, spans: Sequence[int]) -> torch.Tensor:
    """(B, len(spans)) to (B, L): each value at all tokens of its span."""
    parts = zip(values.unbind(1), spans, strict=True)
    return torch.cat([value[:, None].expand(-1, span) for value, span in parts], 1)


def _divide(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """values / total, and 0 where the total is 0: nothing was trained there."""
    return torch.where(total > 0, values / torch.where(total > 0, total, 1), 0)
