"""Log-probability, entropy and KL of tokens from hidden states in plain PyTorch: the specification.

That of the losses is `losses.py` and `policy.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fastvar.kernels.common.recording import recording
from fastvar.kernels.token_log_probs import losses
from fastvar.kernels.token_log_probs.losses import Grads, Results, Scoring, TwoPasses

if TYPE_CHECKING:
    from fastvar.ops.token_log_probs import Head

IMPOSSIBLE = -1e30  # stands for minus infinity in sums: 0 * log 0 is 0
ROWS = (16, 256)  # of a product: a multiple of the first, at most the second


def score(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """See `TwoPasses`."""
    head = scoring.head
    losses.check_range(scoring.tokens, head.hidden.shape[-1] if head.weight is None else len(head.weight))
    return _scored(scoring)


def _scored(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    logits, tokens = _logits(scoring.head, scoring.temperature), scoring.tokens
    others = None if scoring.reference is None else _logits(scoring.reference, scoring.temperature)
    nothing = logits.new_empty(0)
    # Of sums over p log p the factor log p is a constant for the gradient: probabilities sum to 1, so it adds nothing.
    if tokens.ndim == 3:  # each bit is a vocabulary of two, of which the logits differ by z
        one, zero = (F.logsigmoid(z.clamp(IMPOSSIBLE, -IMPOSSIBLE)) for z in (logits, -logits))
        own = F.logsigmoid(torch.where(tokens != 0, logits, -logits)).sum(-1)
        entropy, mean = -(one.exp() * one.detach() + zero.exp() * zero.detach()).sum(-1), (one + zero).sum(-1) / 2
        kl, sums = nothing, logits.new_empty(0, *own.shape)
        if others is not None:
            other_one, other_zero = (F.logsigmoid(z.clamp(IMPOSSIBLE, -IMPOSSIBLE)) for z in (others, -others))
            kl = (one.exp() * (one - other_one).detach() + zero.exp() * (zero - other_zero).detach()).sum(-1)
    else:
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(-1, tokens.long()[..., None])[..., 0]
        log_probs = log_probs.clamp_min(IMPOSSIBLE)
        entropy, mean = -(log_probs.exp() * log_probs.detach()).sum(-1), log_probs.mean(-1)
        kl = nothing
        if others is not None:
            gap = log_probs - others.log_softmax(-1).clamp_min(IMPOSSIBLE)
            kl = (log_probs.exp() * gap.detach()).sum(-1)
        peaks = [(z, z.amax(-1, keepdim=True)) for z in (logits, others) if z is not None]
        sums = torch.stack([part for z, peak in peaks for part in (peak[..., 0], (z - peak).logsumexp(-1))])
    return own, entropy, kl, mean if scoring.mean else nothing, sums.detach()


def gradients(
    scoring: Scoring, results: Results, grads: Grads, needs: Any, unrounded: bool = False
) -> dict[str, torch.Tensor]:
    """See `TwoPasses`; by autograd."""
    # under torch.compile results that nobody used, even empty ones, have gradients of zeros
    given = [None if g is None or g.shape != scoring.tokens.shape[:2] else g for g in grads]
    live = torch.stack([g != 0 for g in given if g is not None]).any(0)
    compute = torch.promote_types(scoring.head.hidden.dtype, torch.float32)
    head, other = (
        None if each is None else each._replace(hidden=torch.where(live[..., None], each.hidden, 0))
        for each in (scoring.head, scoring.reference)
    )
    assert head is not None
    leaves = {n: t.detach().to(compute).requires_grad_() for n, t in head._asdict().items() if t is not None}
    with recording():
        outputs = _scored(scoring._replace(head=head._replace(**leaves), reference=other, mean=True))[:4]
        pairs = [(r, g.to(compute)) for r, g in zip(outputs, given, strict=True) if g is not None]
        results, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, list(leaves.values()), weights)
    dtypes = [t.dtype for t in head if t is not None]
    if unrounded:
        dtypes = [losses.unrounded(head.hidden.dtype), compute, compute]
    return {f"head_{n}": g.to(dtype).contiguous() for n, g, dtype in zip(leaves, found, dtypes, strict=False)}


_FUNCTIONS = TwoPasses(score, gradients)
forward, backward = _FUNCTIONS.forward, _FUNCTIONS.backward
policy_loss, cross_entropy = _FUNCTIONS.policy_loss, _FUNCTIONS.cross_entropy


def _logits(head: Head, temperature: float) -> torch.Tensor:
    """(B, L, V) or (B, L, d)."""
    compute = torch.promote_types(head.hidden.dtype, torch.float32)
    out = head.hidden.to(compute)
    if head.weight is not None:
        weight, bias = head.weight.to(compute), None if head.bias is None else head.bias.to(compute)
        count = out[..., 0].numel()
        # so many rows at a time, as products of very few or of many may sum in another order
        parts = F.pad(out.flatten(0, 1), (0, 0, 0, -count % ROWS[0])).split(ROWS[1])
        logits = torch.cat([F.linear(part, weight, bias) for part in parts])
        out = logits[:count].view(*out.shape[:2], len(weight))
    return out / temperature
