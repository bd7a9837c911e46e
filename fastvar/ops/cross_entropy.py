"""Cross-entropy of tokens from hidden states and the head, without the logits in memory: the supervised loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._one_pass import needed, with_gradients
from fastvar.ops._operator import Operator
from fastvar.ops.token_log_probs import Head, checked, detached, fake_gradients, implementations


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


class CrossEntropyCall(NamedTuple):
    """A call of `cross_entropy`: tokens (B, L) or bits (B, L, d), weights (L,) or (B, L), and which gradients of the
    head it makes."""

    head: Head
    tokens: torch.Tensor
    weights: torch.Tensor | None
    label_smoothing: float
    needs: tuple[bool, ...]


def _fake(call: CrossEntropyCall) -> tuple[torch.Tensor, ...]:
    hidden, shape = call.head.hidden, call.tokens.shape[:2]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    results = (hidden.new_empty(each, dtype=dtype) for each in ((), shape, shape))
    return (*results, *fake_gradients(call.head, call.needs))


_CROSS_ENTROPY = Operator(
    "cross_entropy",
    CrossEntropyCall,
    results=6,  # loss, losses, entropy; the loss's gradients of hidden, weight and bias, empty where not needed
    fake=_fake,
    implementations=implementations("cross_entropy"),
    choices=[Choice("triton", {"sm90": "044712c"})],
    differentiable=False,  # see `with_gradients`
)


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
    """Mean of -log p(token) under softmax(hidden weight^T + bias), and its gradient in the same pass.

    With label smoothing e the target is 1 - e at the token plus e / V everywhere, as in `F.cross_entropy`:
    -(1 - e) log p(token) - e mean_j log p(j). Where a gradient is needed it is made while the logits of some rows are
    there, and the backward pass only multiplies it with the one that comes in.

    Args:
        hidden, weight, bias, tokens: as `token_log_probs` takes them, bits too: each bit has a vocabulary of two, and
            the losses of a token's bits are summed.
        label_smoothing: e, from 0 to 1.
        weights: (L,) or (B, L), at least 0, how much each token counts; for weights of the scales `w[scale_of_token]`.
            None counts all alike. What stands where the weight is 0 has no effect, NaN neither.
        backend: see `fastvar.support()`.

    Returns:
        See `CrossEntropy`. Differentiable in hidden, weight and bias, in float32 (float64 for float64). Without tokens,
        or where all weights are 0, the loss is 0.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit; see `token_log_probs`.
    """
    op = "cross_entropy"
    if not 0 <= label_smoothing <= 1:
        _checks.fail(op, "label_smoothing", "a number from 0 to 1", label_smoothing)
    head = checked(op, Head(hidden, weight, bias), tokens)
    if weights is not None:
        shape = hidden.shape[1:2] if weights.ndim == 1 else hidden.shape[:2]
        _checks.shape(op, "weights", weights, *shape)
        _checks.floating(op, "weights", weights)
        _checks.same_device(op, "hidden", hidden, weights=weights)
    needs = needed(head)
    weights = None if weights is None else weights.detach()
    call = CrossEntropyCall(detached(head), tokens, weights, label_smoothing, needs)
    (loss, losses, entropy, *gradients), chosen = _CROSS_ENTROPY.run(call, backend)
    loss = with_gradients(loss, head, gradients, needs, chosen)
    return CrossEntropy(loss, losses, entropy)
