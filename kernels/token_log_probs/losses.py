"""`forward`, `backward` and the losses made of log-probabilities, for implementations that compute the logits twice.

Gradients of a loss are those of the loss itself, to be multiplied with the gradient that comes in. Those of the weight
and the bias are not rounded yet, nor is that of float16 hidden states: until then it may be below the least float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastvar.kernels.token_log_probs import policy

if TYPE_CHECKING:
    from fastvar.ops.cross_entropy import CrossEntropyCall
    from fastvar.ops.policy_loss import PolicyLossCall, PolicyLossOptions
    from fastvar.ops.token_log_probs import Head, LogProbsCall

Results = Sequence[torch.Tensor]
Grads = Sequence[torch.Tensor | None]


class Scoring(NamedTuple):
    """What is scored: tokens by a head, beside a reference's; `mean` asks for the mean over the vocabulary."""

    head: Head
    tokens: torch.Tensor
    reference: Head | None = None
    temperature: float = 1.0
    mean: bool = False


class Wanted(NamedTuple):
    """Which gradients of a head are needed."""

    head_hidden: bool
    head_weight: bool
    head_bias: bool


class TwoPasses:
    """The functions of an implementation, from two of its own.

    Args:
        score: of a `Scoring`: (B, L) log-probabilities, entropies, KL(policy || reference), mean log-probability of the
            vocabulary; (2 n, B, L) the largest logit and the log of the sum of exp(logit - largest), of the reference's
            too. Empty are the KL without a reference, the mean if not asked for and the last of bits. The two stay
            apart as their sum, the log-sum-exp, loses the digits of the second to the first: a common offset of all
            logits would then change their probabilities.
        gradients: of a `Scoring`, what `score` gave, the gradients of its first four results, what is `Wanted` and
            whether to leave gradients unrounded: those that are wanted, by name. Rows whose incoming gradients are all
            0 are left out: hidden states there may be anything, NaN included.
    """

    def __init__(self, score: Callable[[Scoring], Results], gradients: Callable[..., dict[str, torch.Tensor]]) -> None:
        self.score, self.gradients = score, gradients

    def forward(self, call: LogProbsCall) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies, KL and sums."""
        own, entropy, kl, _, sums = self.score(Scoring(*call))
        return own, entropy, kl, sums

    def backward(self, call: LogProbsCall, saved: Results, grads: Grads, needs: Any) -> dict[str, torch.Tensor]:
        """Gradients of the head, as far as they are needed; saved: the results, if `gradients` looks at them."""
        results = (*saved[:3], None, *saved[3:])
        return self.gradients(Scoring(*call), results, (*grads[:3], None), needs)

    def policy_loss(
        self, call: PolicyLossCall, terms: Callable[..., tuple[torch.Tensor, ...]] = policy.terms
    ) -> tuple[torch.Tensor, ...]:
        """What `terms` measures, the log-probabilities (B, L), and three gradients, empty where not wanted."""
        scoring = Scoring(call.head, call.tokens, call.reference, call.temperature)
        results = self.score(scoring)
        kl = None if call.reference is None else results[2]
        *measured, slope, share = terms(results[0], results[1], kl, call)
        incoming = [slope, *_of_entropy_and_kl(share, kl, call.options), None]
        return (*measured, results[0], *self._three(scoring, results, incoming, call.needs))

    def cross_entropy(self, call: CrossEntropyCall) -> tuple[torch.Tensor, ...]:
        """The loss (), each token's and its entropy (B, L), and three gradients, empty where not wanted."""
        scoring = Scoring(call.head, call.tokens, mean=call.label_smoothing > 0)
        results = self.score(scoring)
        share = shares(call.weights, results[0])
        gradients = self._three(scoring, results, of_scores(share, call.label_smoothing), call.needs)
        return (*smoothed(results, share, call.label_smoothing), *gradients)

    def _three(
        self, scoring: Scoring, results: Results, incoming: Grads, needs: tuple[bool, ...]
    ) -> list[torch.Tensor]:
        wanted = Wanted(*needs)
        found = self.gradients(scoring, results, incoming, wanted, unrounded=True) if any(needs) else {}
        return three(found, wanted, results[0])


def three(found: dict[str, torch.Tensor], wanted: Wanted, like: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of hidden, weight and bias, empty where not wanted."""
    return [found[name] if each else like.new_empty(0) for name, each in wanted._asdict().items()]


def _of_entropy_and_kl(
    share: torch.Tensor, kl: torch.Tensor | None, options: PolicyLossOptions
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the loss with respect to each token's entropy and exact KL, None where it does not read them."""
    return (
        -options.entropy_weight * share if options.entropy_weight != 0 else None,
        options.kl_weight * share if kl is not None and options.kl_weight != 0 else None,
    )


def shares(weights: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """What each token counts of the mean (B, L); 0 where all weights are."""
    if weights is None:
        return torch.full_like(like, 1 / max(like.numel(), 1))
    each = weights.to(like.dtype).expand_as(like)
    total = each.sum()
    return each / torch.where(total > 0, total, 1)


def of_scores(share: torch.Tensor, label_smoothing: float) -> list[torch.Tensor | None]:
    """Gradients of the loss with respect to each token's log-probability, entropy, KL and mean log-probability."""
    return [(label_smoothing - 1) * share, None, None, -label_smoothing * share if label_smoothing > 0 else None]


def smoothed(
    results: Sequence[torch.Tensor], share: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the tokens' losses and entropies from what `forward` gives."""
    losses = -results[0]
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * results[3]
    return (share * torch.where(share > 0, losses, 0)).sum(), losses, results[1]


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient of hidden states that is yet to be multiplied with the one that comes in."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_range(tokens: torch.Tensor, size: int) -> None:
    """Raise a ValueError for tokens that are not below `size`, or bits other than 0 and 1. On another device than the
    CPU the check would wait for it; there a token out of range is the caller's to avoid."""
    if tokens.device.type != "cpu" or tokens.dtype == torch.bool or tokens.numel() == 0:
        return
    low, high = (int(value) for value in tokens.aminmax())
    most = 1 if tokens.ndim == 3 else size - 1
    if low < 0 or high > most:
        raise ValueError(f"token_log_probs: tokens: expected values from 0 to {most}, got {low} to {high}")
