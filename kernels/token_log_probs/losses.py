"""The losses made of log-probabilities, with gradients of hidden, weight and bias, from an implementation's `forward`
and `backward`: for implementations that compute the logits twice.

Gradients are those of the loss itself, to be multiplied with the gradient that comes in; those of the weight and the
bias are not rounded yet, that of float16 hidden states neither, as it may be below the least float16 until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastvar.kernels.token_log_probs import policy

Scores = Callable[..., tuple[torch.Tensor, ...]]
Gradients = Callable[..., list[torch.Tensor]]


def policy_loss(
    forward: Scores,
    backward: Gradients,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    reference_bias: torch.Tensor | None,
    temperature: float,
    wanted: Sequence[bool],
    *settings: Any,
    terms: Callable[..., tuple[torch.Tensor, ...]] = policy.terms,
) -> tuple[torch.Tensor, ...]:
    """What `terms` measures, the log-probabilities (B, L), and three gradients, empty where not wanted."""
    head = (hidden, weight, bias, tokens, reference_hidden, reference_weight, reference_bias, temperature, False)
    results = forward(*head)
    log_probs, entropy = results[:2]
    kl = None if reference_hidden is None else results[2]
    *measured, slope, share = terms(log_probs, entropy, kl, *settings)
    incoming = [slope, *of_entropy_and_kl(share, kl, settings), None, None]
    return (*measured, log_probs, *_three(backward, incoming, head, results, wanted))


def of_entropy_and_kl(
    share: torch.Tensor, kl: torch.Tensor | None, settings: Sequence[Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the loss with respect to each token's entropy and exact KL, None where it does not read them."""
    kl_weight, _, entropy_weight = settings[-3:]
    return (
        -entropy_weight * share if entropy_weight != 0 else None,
        kl_weight * share if kl is not None and kl_weight != 0 else None,
    )


def cross_entropy(
    forward: Scores,
    backward: Gradients,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    weights: torch.Tensor | None,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The loss (), each token's and its entropy (B, L), and three gradients, empty where not wanted."""
    head = (hidden, weight, bias, tokens, None, None, None, 1.0, label_smoothing > 0)
    results = forward(*head)
    share = shares(weights, results[0])
    incoming = [*of_scores(share, label_smoothing), None]
    return (*smoothed(results, share, label_smoothing), *_three(backward, incoming, head, results, wanted))


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


def _three(
    backward: Gradients,
    incoming: Sequence[torch.Tensor | None],
    head: Sequence[Any],
    results: Sequence[torch.Tensor],
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    found = iter(backward(incoming, *head, results, wanted, unrounded=True) if any(wanted) else ())
    return [next(found) if each else results[0].new_empty(0) for each in wanted]


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient of hidden states that is yet to be multiplied with the one that comes in."""
    return torch.float32 if dtype == torch.float16 else dtype
