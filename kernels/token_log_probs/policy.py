"""The clipped policy objective on log-probabilities, in plain PyTorch, with its gradient written out.

Per token i of sample b, with m_i the mask, k_t = (h_t w_t)^-alpha and D the normalisation:

    loss = sum_i w_i (beta kl_i - s_i - gamma H_i) / D      s_i = min(r_i A_b, clip(r_i) A_b)

w_i = m_i k_t and D = sum w ("per_segment") or D = sum m ("none"); "per_scale" takes each scale's mean and weighs those
with k_t: w_i = m_i k_t / (sum of m in the scale), D = sum of k_t over the scales that have tokens. The share w_i / D
depends on the masks alone. Where the advantage or the mask is 0, s_i is 0 whatever the ratio is, infinite too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.policy_loss import PolicyLossCall, PolicyLossOptions


class Policy:
    """The settings and tensors of a call, with the tokens' shares: all that is known before the log-probabilities.

    Attributes:
        share: (B, L), w / D.
    """

    def __init__(self, call: PolicyLossCall, dtype: torch.dtype) -> None:
        options = call.options
        self.options, self.lengths = options, call.schedule.lengths
        self.bounds = 1 - options.clip_low, 1 + options.clip_high  # of the ratio
        self.mask, self.weight, self.total = _weights(call, dtype)
        self.share = _divide(self.weight, self.total)
        gain = call.advantages.to(dtype)[:, None].expand_as(self.mask).contiguous()
        old, reference = (
            None if t is None else t.to(dtype).contiguous() for t in (call.old_log_probs, call.reference_log_probs)
        )
        self._of_tokens = (self.mask > 0, gain, self.share, old, reference)  # (B, L) each

    def incoming(self, rows: slice, results: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the loss with respect to log-probabilities, entropies and the exact KL of some of all tokens
        (B L), from these results there. Only where a ratio is one token's."""
        log_probs, _, kl = results
        assert log_probs is not None
        trained, gain, share, old, reference = (None if t is None else t.view(-1)[rows] for t in self._of_tokens)
        assert trained is not None and gain is not None and share is not None
        _, push, _ = surrogate(_log_ratio(log_probs, old, trained).exp(), gain, trained, *self.bounds)
        slope = share * push + self._of_estimate(log_probs, trained, share, reference)
        return [-slope, *of_entropy_and_kl(share, kl is not None, self.options), None]

    def measure(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, exact_kl: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """loss, kl, clip fraction, entropy, ratio, scalars; gradient share, entropy and ratio of each scale (K,); for
        the gradient d loss / d log_probs without the exact KL (B, L)."""
        options, mask, lengths = self.options, self.mask, self.lengths
        trained, gain, share, old, reference = self._of_tokens

        def only_trained(values: torch.Tensor) -> torch.Tensor:
            return torch.where(trained, values, 0)  # whatever stands at other tokens, NaN included, has no effect

        log_ratio = _log_ratio(log_probs, old, trained)
        spans = {"token": None, "scale": lengths, "sample": (sum(lengths),)}[options.ratio_level]
        if spans is not None:
            log_ratio = _spread(_divide(_sums(mask * log_ratio, spans), _sums(mask, spans)), spans)
        ratio = log_ratio.exp()
        won, push, clipped = surrogate(ratio, gain, trained, *self.bounds)
        push = share * push
        if spans is not None:  # for a ratio of many tokens, each of them has its share of all their slopes
            push = mask * _spread(_divide(_sums(push, spans), _sums(mask, spans)), spans)
        slope = -(push + self._of_estimate(log_probs, trained, share, reference))

        kl = None
        if exact_kl is not None:
            kl = only_trained(exact_kl)
        elif reference is not None:
            kl = estimate(only_trained(reference - log_probs), options.kl_estimator)[0]
        cost = -won
        if options.kl_weight != 0 and kl is not None:
            cost = cost + options.kl_weight * kl
        if options.entropy_weight != 0:
            cost = cost - options.entropy_weight * only_trained(entropy)

        def sums(values: torch.Tensor) -> torch.Tensor:  # [K], of the trained tokens
            return _sums(mask * only_trained(values), lengths).sum(0)

        norms = torch.stack([part.square().sum().sqrt() for part in slope.split(lengths, 1)])
        tokens, entropies, ratios = _sums(mask, lengths).sum(0), sums(entropy), sums(ratio)
        count = tokens.sum()
        loss = _divide((self.weight * cost).sum(), self.total)
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
        )

    def _of_estimate(
        self, log_probs: torch.Tensor, trained: torch.Tensor, share: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor | float:
        """Minus the gradient of the estimated KL's part of the loss."""
        if reference is None or self.options.kl_weight == 0:
            return 0.0
        gap = torch.where(trained, reference - log_probs, 0)
        return self.options.kl_weight * share * estimate(gap, self.options.kl_estimator)[1]


def terms(
    log_probs: torch.Tensor, entropy: torch.Tensor, exact_kl: torch.Tensor | None, call: PolicyLossCall
) -> tuple[torch.Tensor, ...]:
    """What `Policy.measure` gives, and w / D of each token (B, L)."""
    loss = Policy(call, log_probs.dtype)
    return (*loss.measure(log_probs, entropy, exact_kl), loss.share)


def surrogate(
    ratio: torch.Tensor, gain: torch.Tensor, trained: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s, its derivative by the logarithm of the ratio, and whether the clip holds the ratio."""
    product = ratio * gain
    held = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))
    moves = trained & (gain != 0)
    value = torch.minimum(product, ratio.clamp(low, high) * gain)
    return torch.where(moves, value, 0), torch.where(moves & ~held, product, 0), held


def estimate(gap: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL estimate from g = l^ref - l, and its derivative by g."""
    if estimator == "k2":
        return gap.square() / 2, gap
    grown = gap.expm1()
    return grown - gap, grown


def of_entropy_and_kl(
    share: torch.Tensor, exact: bool, options: PolicyLossOptions
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the loss with respect to tokens' entropies and exact KL, None where it does not read them."""
    return (
        -options.entropy_weight * share if options.entropy_weight != 0 else None,
        options.kl_weight * share if exact and options.kl_weight != 0 else None,
    )


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def factors(grids: ScaleSchedule, alpha: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """k_t of the scales (K,), made once: a copy to the device on every call would wait for it."""
    return torch.tensor([float(h * w) ** -alpha for h, w in grids], dtype=dtype, device=device)


def _log_ratio(log_probs: torch.Tensor, old: torch.Tensor | None, trained: torch.Tensor) -> torch.Tensor:
    """0 on-policy and where nothing is trained."""
    return torch.zeros_like(log_probs) if old is None else torch.where(trained, log_probs - old, 0)


def _weights(call: PolicyLossCall, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m (B, L), w (B, L) and D ()."""
    grids, normalisation = call.schedule, call.options.panw_normalisation
    mask = torch.ones(call.tokens.shape[:2], dtype=dtype, device=call.tokens.device)
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
