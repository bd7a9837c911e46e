"""The clipped policy objective on log-probabilities, in plain PyTorch, with its gradient written out.

Per token i of sample b, with m_i the mask, k_t = (h_t w_t)^-alpha and D the normalisation:

    loss = sum_i w_i (beta kl_i - s_i - gamma H_i) / D      s_i = min(r_i A_b, clip(r_i) A_b)

w_i = m_i k_t and D = sum w ("per_segment") or D = sum m ("none"); "per_scale" takes each scale's mean and weighs those
with k_t: w_i = m_i k_t / (sum of m in the scale), D = sum of k_t over the scales that have tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvar.schedule import ScaleSchedule


class _Terms(NamedTuple):
    loss: torch.Tensor  # ()
    mask: torch.Tensor  # (B, L), m
    share: torch.Tensor  # (B, L), w / D
    ratio: torch.Tensor  # (B, L)
    clipped: torch.Tensor  # (B, L) bool: the clip holds the ratio, no gradient
    kl: torch.Tensor | None  # (B, L)
    slope: torch.Tensor  # (B, L), d loss / d log_probs


def forward(*args: Any) -> tuple[torch.Tensor, ...]:
    """loss, kl, clip fraction, entropy, ratio, scalars; gradient share, entropy and ratio of each scale (K,); for the
    backward pass d loss / d log_probs and w / D of each token (B, L)."""
    entropy, grids = args[1], args[8]
    terms = _terms(*args)

    def trained(values: torch.Tensor) -> torch.Tensor:
        return terms.mask * torch.where(terms.mask > 0, values, 0)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return _divide(trained(values).sum(), terms.mask.sum())

    def scale_means(values: torch.Tensor) -> torch.Tensor:
        sums = (_sums(part, grids.lengths).sum(0) for part in (trained(values), terms.mask))
        return _divide(*sums)

    norms = torch.stack([part.square().sum().sqrt() for part in terms.slope.split(grids.lengths, 1)])
    return (
        terms.loss,
        torch.zeros_like(terms.loss) if terms.kl is None else mean(terms.kl),
        mean(terms.clipped.to(entropy.dtype)),
        mean(entropy),
        mean(terms.ratio),
        _divide(norms, norms.sum()),
        scale_means(entropy),
        scale_means(terms.ratio),
        terms.slope,
        terms.share,
    )


def backward(grads: Sequence[torch.Tensor | None], *args: Any) -> list[torch.Tensor]:
    """Gradients of log_probs, entropy and exact_kl, through the loss alone; the other results are measurements."""
    *_, kl_weight, _, entropy_weight, results, needs = args
    slope, share = results[-2:]
    if grads[0] is None:
        return [torch.zeros_like(slope) for need in needs if need]
    slopes = ((slope, 1.0), (share, -entropy_weight), (share, kl_weight))
    return [grads[0] * factor * each for (each, factor), need in zip(slopes, needs, strict=False) if need]


def _terms(
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
) -> _Terms:
    lengths = grids.lengths
    mask = torch.ones_like(log_probs)
    if token_mask is not None:
        mask.copy_(token_mask)
    mask[:, : grids.starts[first_scale]].zero_()
    trained = mask > 0
    totals = None
    if mask_totals is not None:
        totals = mask_totals.to(mask.dtype, copy=True)
        totals[:first_scale].zero_()
    weight, normalisation = _weights(mask, grids, panw_alpha, panw_normalisation, totals)

    def only_trained(values: torch.Tensor) -> torch.Tensor:
        return torch.where(trained, values, 0)  # whatever stands at other tokens, NaN included, has no effect

    if old_log_probs is None:  # on-policy
        log_ratio = torch.zeros_like(log_probs)
    else:
        log_ratio = only_trained(log_probs - old_log_probs.to(log_probs.dtype))
    spans = {"token": None, "scale": lengths, "sample": (sum(lengths),)}[ratio_level]
    if spans is not None:
        log_ratio = _spread(_divide(_sums(mask * log_ratio, spans), _sums(mask, spans)), spans)
    ratio = log_ratio.exp()
    gain = advantages.to(log_probs.dtype)[:, None]  # [B, 1]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)
    clipped = ((gain > 0) & (ratio > 1 + clip_high)) | ((gain < 0) & (ratio < 1 - clip_low))

    # d s / d log_ratio; for a ratio of many tokens, each of them has its share of all their slopes
    share = _divide(weight, normalisation)
    slope = -share * torch.where(clipped, 0, ratio * gain)
    if spans is not None:
        slope = mask * _spread(_divide(_sums(slope, spans), _sums(mask, spans)), spans)

    kl = None
    kl_slope = None
    if exact_kl is not None:
        kl = only_trained(exact_kl)
    elif reference_log_probs is not None:
        gap = only_trained(reference_log_probs.to(log_probs.dtype) - log_probs)
        if kl_estimator == "k2":
            kl, kl_slope = gap.square() / 2, -gap
        else:
            kl, kl_slope = gap.expm1() - gap, -gap.expm1()

    cost = -surrogate
    if kl_weight != 0 and kl is not None:
        cost = cost + kl_weight * kl
        if kl_slope is not None:
            slope = slope + kl_weight * share * kl_slope
    if entropy_weight != 0:
        cost = cost - entropy_weight * only_trained(entropy)
    loss = _divide((weight * cost).sum(), normalisation)
    return _Terms(loss, mask, share, ratio, clipped & trained, kl, slope)


def _weights(
    mask: torch.Tensor, grids: ScaleSchedule, alpha: float, normalisation: str, totals: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w (B, L) and D (); totals: (K,) of the whole batch's mask, or None if the mask is the whole batch's."""
    # [K], filled on the device: a copy of constants from the host waits for it
    factors = torch.cat([mask.new_full((1,), float(h * w) ** -alpha) for h, w in grids])
    per_token = torch.cat([f.expand(n) for n, f in zip(grids.lengths, factors, strict=True)])
    weight = mask * per_token
    if normalisation == "per_scale":
        if totals is None:
            totals = torch.stack([part.sum() for part in mask.split(grids.lengths, 1)])
        parts = zip(mask.split(grids.lengths, 1), totals, strict=True)
        means = torch.cat([_divide(part, total) for part, total in parts], 1)
        return means * per_token, (factors * (totals > 0)).sum()
    if normalisation == "none":
        return weight, mask.sum() if totals is None else totals.sum()
    return weight, weight.sum() if totals is None else (factors * totals).sum()


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
