"""What implementations share of log-probabilities and the losses made of them.

Gradients of a loss are those of the loss itself, to be multiplied with the gradient that comes in. Those of the weight
and the bias are not rounded yet, nor is that of float16 hidden states: until then it may be below the least float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastvar.kernels.token_log_probs import policy

if TYPE_CHECKING:
    from fastvar.ops.policy_loss import PolicyLossCall
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
            vocabulary. Empty are the KL without a reference and the mean if not asked for.
        gradients: of a `Scoring`, the gradients of these four results, what is `Wanted` and whether to leave gradients
            unrounded: those that are wanted, by name. Rows whose incoming gradients are all 0 are left out: hidden
            states there may be anything, NaN included.
    """

    def __init__(self, score: Callable[[Scoring], Results], gradients: Callable[..., dict[str, torch.Tensor]]) -> None:
        self.score, self.gradients = score, gradients

    def forward(self, call: LogProbsCall) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies and KL."""
        own, entropy, kl, _ = self.score(Scoring(*call))
        return own, entropy, kl

    def backward(self, call: LogProbsCall, saved: Results, grads: Grads, needs: Any) -> dict[str, torch.Tensor]:
        """Gradients of the head, as far as they are needed."""
        return self.gradients(Scoring(*call), (*grads, None), needs)

    def policy_loss(
        self, call: PolicyLossCall, terms: Callable[..., tuple[torch.Tensor, ...]] = policy.terms
    ) -> tuple[torch.Tensor, ...]:
        """What `terms` measures, the log-probabilities (B, L), and three gradients, empty where not wanted."""
        scoring = Scoring(call.head, call.tokens, call.reference, call.temperature)
        results, wanted = self.score(scoring), Wanted(*call.needs)
        kl = None if call.reference is None else results[2]
        *measured, slope, share = terms(results[0], results[1], kl, call)
        incoming = [slope, *policy.of_entropy_and_kl(share, kl is not None, call.options), None]
        found = self.gradients(scoring, incoming, wanted, unrounded=True) if any(wanted) else {}
        return (*measured, results[0], *three(found, wanted, results[0]))


def three(found: dict[str, torch.Tensor], wanted: Wanted, like: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of hidden, weight and bias, empty where not wanted."""
    return [found[name] if each else like.new_empty(0) for name, each in wanted._asdict().items()]


def shares(weights: torch.Tensor | None, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each token counts of the mean (B, L); 0 where all weights are."""
    shape = tokens.shape[:2]
    if weights is None:
        return torch.full(shape, 1 / max(shape.numel(), 1), dtype=dtype, device=tokens.device)
    each = weights.to(dtype).expand(shape)
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
