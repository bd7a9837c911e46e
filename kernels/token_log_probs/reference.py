"""Log-probability, entropy and KL of tokens from hidden states, and the losses made of them: the specification.

Nothing of it is the implementations', whose formulas it is there to check: every gradient is autograd's. A loss is a
function of its tokens' scores (log-probability, entropy, KL and mean log-probability of the vocabulary). Its gradients
by these are taken first and those of the head from them, as tokens without such a gradient are left out of the head's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from fastvar.kernels.common.recording import recording
from fastvar.kernels.token_log_probs import checks

if TYPE_CHECKING:
    from fastvar.ops.cross_entropy import CrossEntropyCall
    from fastvar.ops.policy_loss import PolicyLossCall
    from fastvar.ops.token_log_probs import Head, LogProbsCall

IMPOSSIBLE = -1e30  # stands for minus infinity in sums: 0 * log 0 is 0
ROWS = (16, 256)  # of a product: a multiple of the first, at most the second


class _Scored(NamedTuple):
    """What is scored, as `LogProbsCall` has it."""

    head: Head
    tokens: torch.Tensor
    reference: Head | None = None
    temperature: float = 1.0


class _Scores(NamedTuple):
    """(B, L) each; kl is None without a reference."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None
    mean: torch.Tensor


def forward(call: LogProbsCall) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies and KL (B, L), the last empty without a reference."""
    scores = _scores(*call)
    return scores.log_probs, scores.entropy, scores.log_probs.new_empty(0) if scores.kl is None else scores.kl


def backward(call: LogProbsCall, saved: Any, grads: Sequence[torch.Tensor | None], needs: Any) -> dict[str, Any]:
    """Gradients of the head."""
    # under torch.compile results that nobody used, even empty ones, have gradients of zeros
    given = [None if g is None or g.shape != call.tokens.shape[:2] else g for g in grads]
    found = _of_head(call, [*given, None])
    dtypes = [t.dtype for t in call.head if t is not None]
    return {f"head_{name}": g.to(dtype) for (name, g), dtype in zip(found.items(), dtypes, strict=True)}


def cross_entropy(call: CrossEntropyCall) -> tuple[torch.Tensor, ...]:
    """The loss (), each token's and its entropy (B, L); gradients of hidden, weight, bias, empty where not needed."""
    scores, smoothing = _scores(call.head, call.tokens), call.label_smoothing
    weights = torch.ones_like(scores.log_probs)
    if call.weights is not None:
        weights = call.weights.to(weights.dtype).expand_as(weights)
    share = _divide(weights, weights.sum())
    with recording():
        log_probs, mean = (t.detach().requires_grad_() for t in (scores.log_probs, scores.mean))
        losses = -log_probs
        if smoothing > 0:
            losses = (1 - smoothing) * losses - smoothing * mean
        loss = (share * torch.where(share > 0, losses, 0)).sum()
        of_own, of_mean = torch.autograd.grad(loss, (log_probs, mean), allow_unused=True)
    gradients = _needed(_Scored(call.head, call.tokens), [of_own, None, None, of_mean], call.needs)
    return loss.detach(), losses.detach(), scores.entropy, *gradients


def policy_loss(call: PolicyLossCall) -> tuple[torch.Tensor, ...]:
    """The loss () and what else `PolicyLoss` has, its log-probabilities last; gradients of hidden, weight and bias,
    empty where not needed."""
    scored = _Scored(call.head, call.tokens, call.reference, call.temperature)
    scores = _scores(*scored)
    with recording():
        # zero, added to the log-probabilities: on-policy the ratio is exactly 1 and has a gradient, whatever they are
        step = torch.zeros_like(scores.log_probs).requires_grad_()
        entropy = scores.entropy.detach().requires_grad_()
        kl = None if scores.kl is None else scores.kl.detach().requires_grad_()
        loss, measured = _policy_loss(call, scores.log_probs.detach(), step, entropy, kl)
        leaves = [step, entropy] if kl is None else [step, entropy, kl]
        of_own, of_entropy, *of_kl = torch.autograd.grad(loss, leaves, allow_unused=True)
    norms = torch.stack([part.norm() for part in of_own.split(call.schedule.lengths, 1)])
    scalars, by_scale = measured[:4], measured[4:]
    gradients = _needed(scored, [of_own, of_entropy, *(of_kl or [None]), None], call.needs)
    return loss.detach(), *scalars, _divide(norms, norms.sum()), *by_scale, scores.log_probs, *gradients


def _policy_loss(
    call: PolicyLossCall,
    log_probs: torch.Tensor,
    step: torch.Tensor,
    entropy: torch.Tensor,
    exact_kl: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, as `ops.policy_loss` defines it, of the log-probabilities `log_probs + step`; kl, clip fraction,
    entropy and ratio, means over the trained tokens, entropy and ratio of each scale (K,)."""
    options, dtype, lengths = call.options, log_probs.dtype, call.schedule.lengths
    mask = torch.ones_like(log_probs) if call.token_mask is None else call.token_mask.to(dtype)
    untrained = call.schedule.starts[call.first_scale]
    mask = torch.cat([torch.zeros_like(mask[:, :untrained]), mask[:, untrained:]], 1)
    trained = mask > 0

    def of_trained(values: torch.Tensor) -> torch.Tensor:
        return torch.where(trained, values, 0)  # whatever stands at other tokens, NaN included, has no effect

    # w_i, and what sums are divided by
    masks, total = list(mask.split(lengths, 1)), mask.new_zeros(())
    for k, (height, width) in enumerate(call.schedule):
        factor = float(height * width) ** -options.panw_alpha
        count = masks[k].sum() if call.mask_totals is None or k < call.first_scale else call.mask_totals[k].to(dtype)
        if options.panw_normalisation == "per_scale":
            masks[k] = _divide(factor * masks[k], count)
            total = total + factor * (count > 0).to(dtype)
        else:
            masks[k] = factor * masks[k]
            total = total + (count if options.panw_normalisation == "none" else factor * count)
    weight = torch.cat(masks, 1)

    # r_i
    log_ratio = step
    if call.old_log_probs is not None:
        log_ratio = of_trained(log_probs + step - call.old_log_probs.to(dtype))
    if options.ratio_level != "token":
        spans = lengths if options.ratio_level == "scale" else (sum(lengths),)
        parts = zip(log_ratio.split(spans, 1), mask.split(spans, 1), strict=True)
        means = [_divide((m * x).sum(1, keepdim=True), m.sum(1, keepdim=True)).expand_as(x) for x, m in parts]
        log_ratio = torch.cat(means, 1)
    ratio = log_ratio.detach().exp()

    # s_i: a held ratio is a constant, and where the advantage is 0 there is nothing, were the ratio infinite
    low, high = 1 - options.clip_low, 1 + options.clip_high
    gain = call.advantages.to(dtype)[:, None]
    held = trained & (((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low)))
    moves = trained & (gain != 0)
    free = moves & ~held
    surrogate = torch.where(moves, ratio.clamp(low, high) * gain, 0)
    surrogate = torch.where(free, torch.where(free, log_ratio, 0).exp() * gain, surrogate)

    kl = torch.zeros_like(log_probs)
    if exact_kl is not None:
        kl = of_trained(exact_kl)
    elif call.reference_log_probs is not None:
        gap = of_trained(call.reference_log_probs.to(dtype) - (log_probs + step))
        kl = gap.square() / 2 if options.kl_estimator == "k2" else gap.expm1() - gap
    cost = -surrogate
    if options.kl_weight != 0:
        cost = cost + options.kl_weight * kl
    if options.entropy_weight != 0:
        cost = cost - options.entropy_weight * of_trained(entropy)
    loss = _divide((weight * cost).sum(), total)

    def sums(values: torch.Tensor) -> torch.Tensor:
        parts = (mask * of_trained(values.detach())).split(lengths, 1)
        return torch.stack([part.sum() for part in parts])

    counts = sums(torch.ones_like(mask))
    each = [sums(values) for values in (kl, held.to(dtype), entropy, ratio)]
    by_scale = [_divide(values, counts) for values in each[2:]]
    return loss, [*(_divide(values.sum(), counts.sum()) for values in each), *by_scale]


def _scores(head: Head, tokens: torch.Tensor, reference: Head | None = None, temperature: float = 1.0) -> _Scores:
    checks.check_range(tokens, head.hidden.shape[-1] if head.weight is None else len(head.weight))
    logits = _logits(head, temperature)
    others = None if reference is None else _logits(reference, temperature)
    kl = None
    # Of sums over p log p the factor log p is a constant for the gradient: probabilities sum to 1, so it adds nothing.
    if tokens.ndim == 3:  # each bit is a vocabulary of two, of which the logits differ by z
        one, zero = (F.logsigmoid(z.clamp(IMPOSSIBLE, -IMPOSSIBLE)) for z in (logits, -logits))
        own = F.logsigmoid(torch.where(tokens != 0, logits, -logits)).sum(-1)
        entropy, mean = -(one.exp() * one.detach() + zero.exp() * zero.detach()).sum(-1), (one + zero).sum(-1) / 2
        if others is not None:
            other_one, other_zero = (F.logsigmoid(z.clamp(IMPOSSIBLE, -IMPOSSIBLE)) for z in (others, -others))
            kl = (one.exp() * (one - other_one).detach() + zero.exp() * (zero - other_zero).detach()).sum(-1)
    else:
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(-1, tokens.long()[..., None])[..., 0]
        log_probs = log_probs.clamp_min(IMPOSSIBLE)
        entropy, mean = -(log_probs.exp() * log_probs.detach()).sum(-1), log_probs.mean(-1)
        if others is not None:
            gap = log_probs - others.log_softmax(-1).clamp_min(IMPOSSIBLE)
            kl = (log_probs.exp() * gap.detach()).sum(-1)
    return _Scores(own, entropy, kl, mean)


def _of_head(call: LogProbsCall | _Scored, given: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Gradients of the head's tensors by name, not rounded yet, from those of the four scores. Rows whose gradients are
    all 0 are left out: hidden states there may be anything, NaN included."""
    live = torch.stack([g != 0 for g in given if g is not None]).any(0)
    dtype = torch.promote_types(call.head.hidden.dtype, torch.float32)
    head, reference = (
        None if each is None else each._replace(hidden=torch.where(live[..., None], each.hidden, 0))
        for each in (call.head, call.reference)
    )
    assert head is not None
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in head._asdict().items() if t is not None}
    with recording():
        scores = _scores(head._replace(**leaves), call.tokens, reference, call.temperature)
        pairs = [(s, g.to(dtype)) for s, g in zip(scores, given, strict=True) if s is not None and g is not None]
        outputs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return {name: gradient.contiguous() for name, gradient in zip(leaves, found, strict=True)}


def _needed(call: _Scored, given: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor]:
    """The gradients of hidden, weight and bias of a loss, empty where not needed: in float32 or float64, only the first
    in the dtype of bfloat16 hidden states."""
    found = _of_head(call, given) if any(needs) else {}
    hidden = call.head.hidden
    empty = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if needs[0] and hidden.dtype == torch.bfloat16:
        found["hidden"] = found["hidden"].to(hidden.dtype)
    return [found[n] if need else empty.clone() for n, need in zip(call.head._fields, needs, strict=True)]


def _divide(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """values / total, and 0 where the total is 0: nothing was trained there."""
    return torch.where(total > 0, values / torch.where(total > 0, total, 1), 0)


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
