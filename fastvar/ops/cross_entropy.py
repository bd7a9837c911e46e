"""Cross-entropy of tokens from hidden states and the head, without the logits in memory: the supervised loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops.token_log_probs import score


class CrossEntropy(NamedTuple):
    """The loss, which carries the gradient; the rest is detached, for logs.

    Attributes:
        loss: (), the weighted mean over all tokens.
        losses: (B, L), each token's, smoothed but without its weight.
        entropy: (B, L), of the predicted distributions, in nats.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    entropy: torch.Tensor


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> CrossEntropy:
    """Mean of -log p(token) under softmax(hidden weight^T + bias), by the kernels of `token_log_probs`.

    With label smoothing e the target is 1 - e at the token plus e / V everywhere, as in `F.cross_entropy`:
    -(1 - e) log p(token) - e mean_j log p(j). The mean is one more sum of the same kernels.

    Args:
        hidden, weight, bias, tokens: as `token_log_probs` takes them, bits too: each bit has a vocabulary of two, and
            the losses of a token's bits are summed.
        label_smoothing: e, from 0 to 1.
        weights: (L,) or (B, L), at least 0, how much each token counts; for weights of the scales `w[scale_of_token]`.
            None counts all alike. What stands where the weight is 0 has no effect, NaN neither.
        backend: see `fastvar.support()`; of the operator `token_log_probs`.

    Returns:
        See `CrossEntropy`. Differentiable in hidden, weight and bias, in float32 (float64 for float64). Without tokens,
        or where all weights are 0, the loss is 0.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit; see `token_log_probs`.
    """
    op = "cross_entropy"
    if not 0 <= label_smoothing <= 1:
        _checks.fail(op, "label_smoothing", "a number from 0 to 1", label_smoothing)
    if weights is not None:
        shape = hidden.shape[1:2] if weights.ndim == 1 else hidden.shape[:2]
        _checks.shape(op, "weights", weights, *shape)
        _checks.floating(op, "weights", weights)
        _checks.same_device(op, "hidden", hidden, weights=weights)
    smooth = label_smoothing > 0
    found = score(op, backend, hidden, weight, bias, tokens, 1.0, mean=smooth)
    losses = -found.log_probs
    if found.mean is not None:
        losses = (1 - label_smoothing) * losses - label_smoothing * found.mean
    if weights is None:
        loss = losses.sum() / max(losses.numel(), 1)
    else:
        each = weights.detach().to(losses.dtype).expand_as(losses)
        total = each.sum()
        loss = (each * torch.where(each > 0, losses, 0)).sum() / torch.where(total > 0, total, 1)
    return CrossEntropy(loss, losses.detach(), found.entropy.detach())
