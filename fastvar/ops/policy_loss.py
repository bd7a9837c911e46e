"""The loss of group-relative policy optimisation over scales, and the advantages it uses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._one_pass import needed, with_gradients
from fastvar.ops._operator import Operator
from fastvar.ops.token_log_probs import (
    AnyHead,
    Head,
    as_head,
    checked,
    checked_reference,
    detached,
    fake_gradients,
    implementations,
)
from fastvar.ranges import NotNegative, NotNegativeOrInfinite, Number, OneOf, Range, check_fields
from fastvar.schedule import ScaleSchedule
from fastvar.statistics import centred

NORMALISATIONS = ("group", "batch", "none")
SPREAD_FLOOR = 1e-4
PANW_NORMALISATIONS = ("per_segment", "per_scale", "none")
RATIO_LEVELS = ("token", "scale", "sample")
KL_ESTIMATORS = ("exact", "k2", "k3")


@dataclass(frozen=True)
class PolicyLossOptions:
    """What the policy loss is, from the command line to the kernel; the formula is that of `policy_loss`."""

    panw_alpha: NotNegative = 0.6
    """Exponent of per-action normalisation: a scale's tokens weigh (h w)^-alpha; 0 weighs all tokens alike."""
    panw_normalisation: Annotated[str, OneOf(*PANW_NORMALISATIONS)] = "per_segment"
    """What the weighted sum over the tokens is divided by: "per_segment", the sum of their weights; "none", the number
    of trained tokens; "per_scale" takes the mean over each scale's tokens first, then the weighted mean of those."""
    clip_low: NotNegativeOrInfinite = 0.2
    """How far a ratio may fall below 1 before a negative advantage stops pushing; infinity never clips. TRL:
    epsilon."""
    clip_high: NotNegativeOrInfinite = 0.2
    """How far a ratio may rise above 1 before a positive advantage stops pushing; infinity never clips. TRL:
    epsilon_high."""
    ratio_level: Annotated[str, OneOf(*RATIO_LEVELS)] = "token"
    """The ratio of each "token", or the geometric mean over the trained tokens of a "scale" or of a "sample". TRL:
    importance_sampling_level, whose "sequence" is "sample" here."""
    kl_weight: NotNegative = 0.0
    """Weight of the KL to the reference policy; 0 needs no reference. TRL: beta."""
    kl_estimator: Annotated[str, OneOf(*KL_ESTIMATORS)] = "exact"
    """"exact": the KL over the whole vocabulary. Of the drawn token alone, with g its log-probability under the
    reference minus that under the policy: "k2", g^2 / 2, whose gradient on-policy is the KL's, or "k3",
    exp(g) - g - 1, unbiased in value but not in gradient, which is what TRL has."""
    entropy_weight: Number = 0.0
    """Weight of an entropy bonus."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense."""
        check_fields(self)


class PolicyLoss(NamedTuple):
    """The loss, a scalar that carries the gradient; all else is detached, for logs and later updates.

    Attributes:
        loss: ().
        kl: (), mean KL estimate over the trained tokens, weighted with the mask; 0 without a reference.
        clip_fraction: (), share of the trained tokens whose ratio the clip holds, so that they give no policy gradient.
        entropy: (), mean entropy of the trained tokens in nats.
        log_probs: (B, L), the policy's log-probabilities of all tokens.
        ratio: (), mean ratio of the trained tokens; exactly 1 on-policy.
        gradient_share: (K,), how the gradient divides over the scales: with g_i = d loss / d log_probs_i, the scale's
            share of sum_k |g of scale k|_2. It leaves out |d log_probs_i / d logits| (near 1 unless a token is nearly
            certain), the exact KL and the entropy bonus, which do not pass through log_probs.
        scale_entropy: (K,), mean entropy of each scale's trained tokens in nats; 0 where none is trained.
        scale_ratio: (K,), mean ratio of each scale's trained tokens; 0 where none is trained.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor
    entropy: torch.Tensor
    log_probs: torch.Tensor
    ratio: torch.Tensor
    gradient_share: torch.Tensor
    scale_entropy: torch.Tensor
    scale_ratio: torch.Tensor


class PolicyLossCall(NamedTuple):
    """A call of `policy_loss`, see there: tokens (B, L) or bits (B, L, d); and which gradients of the head it makes."""

    head: Head
    tokens: torch.Tensor
    advantages: torch.Tensor
    schedule: ScaleSchedule
    options: PolicyLossOptions
    old_log_probs: torch.Tensor | None
    reference_log_probs: torch.Tensor | None
    reference: Head | None
    token_mask: torch.Tensor | None
    mask_totals: torch.Tensor | None
    first_scale: int
    temperature: float
    needs: tuple[bool, ...]


def _fake(call: PolicyLossCall) -> tuple[torch.Tensor, ...]:
    _check_options(call.options)
    hidden, scales = call.head.hidden, (len(call.schedule),)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (*[()] * 5, *[scales] * 3, call.tokens.shape[:2])
    return (*(hidden.new_empty(s, dtype=dtype) for s in shapes), *fake_gradients(call.head, call.needs))


_LOSS = Operator(
    "policy_loss",
    PolicyLossCall,
    # the loss, seven measurements, log-probabilities; the loss's gradients of hidden, weight and bias, empty where not
    # needed
    results=12,
    fake=_fake,
    implementations=implementations("policy_loss"),
    choices=[Choice("triton", {"sm90": "044712c"})],
    differentiable=False,  # see `with_gradients`
)


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, normalise: str = "group", spread_floor: float = SPREAD_FLOOR
) -> torch.Tensor:
    """Advantages of samples within their groups: (R_b - mean of the group) / (spread + spread_floor).

    Args:
        rewards: (B,), the rows of a group adjacent. One that is NaN or infinite counts as missing: its advantage is 0
            and its group's mean and spread are those of the others.
        group_size: G, divides B.
        normalise: what to divide by. "group": the standard deviation of the group's rewards; "batch": of all rewards of
            the batch; "none": nothing, the advantage is the deviation from the group's mean.
        spread_floor: added to the standard deviation, so that a group whose rewards hardly differ is not blown up.

    Returns:
        (B,) float32 (float64 for float64), without gradient. Exactly 0 where all rewards of the group are equal. The
        standard deviation is that of the population (divided by G, not G - 1), for which a group's advantages have
        mean square 1 whatever its size; a trainer with the sample's has advantages smaller by sqrt((G - 1) / G).

    Raises:
        ValueError: shapes or settings that do not fit.

    Source: DeepSeekMath (arXiv 2402.03300), which leaves the kind of deviation open.
    """
    op = "group_advantages"
    _checks.shape(op, "rewards", rewards, "B")
    _checks.floating(op, "rewards", rewards)
    if group_size < 1 or rewards.shape[0] % group_size:
        _checks.fail(op, "group_size", f"a number that divides the batch {rewards.shape[0]}", group_size)
    if normalise not in NORMALISATIONS:
        _checks.fail(op, "normalise", f"one of {NORMALISATIONS}", repr(normalise))
    _checks.number(op, "spread_floor", spread_floor, Range(0))
    groups = rewards.view(-1, group_size)
    _, deviation, spread = centred(groups)
    if normalise == "batch":
        spread = centred(groups.view(1, -1)).spread
    if normalise != "none":
        # Where nothing deviates there is no spread: with a floor of 0 that would be 0 / 0.
        deviation = torch.where(deviation != 0, deviation / (spread + spread_floor), 0)
    return deviation.view(-1).to(torch.promote_types(rewards.dtype, torch.float32))


def policy_loss(
    head: AnyHead,
    tokens: torch.Tensor,
    advantages: torch.Tensor,
    schedule: ScaleSchedule,
    options: PolicyLossOptions = PolicyLossOptions(),
    *,
    old_log_probs: torch.Tensor | None = None,
    reference_log_probs: torch.Tensor | None = None,
    reference_head: AnyHead | None = None,
    token_mask: torch.Tensor | None = None,
    mask_totals: torch.Tensor | None = None,
    first_scale: int = 0,
    temperature: float = 1.0,
    backend: str = "auto",
) -> PolicyLoss:
    """The clipped, group-relative policy loss of drawn tokens, from hidden states and the head, without whole logits.

    For token i of sample b and scale t, with l its log-probability, A the advantage and m the mask:

        r_i  = exp(l_i - l_i^old)
        s_i  = min(r_i A_b, clip(r_i, 1 - clip_low, 1 + clip_high) A_b)
        w_i  = (h_t w_t)^-panw_alpha m_i
        loss = -sum_i w_i (s_i - kl_weight kl_i + entropy_weight H_i) / sum_i w_i

    All sums run over the batch. What is divided by is another sum with `panw_normalisation`, see `PolicyLossOptions`.

    Args:
        head: (hidden (B, L, E), weight (V, E), bias (V,) or None), for bits weight (d, E) and bias (d,); or the logits
            alone, (B, L, V) or (B, L, d). See `token_log_probs`.
        tokens: (B, L), or bits (B, L, d).
        advantages: (B,), see `group_advantages`.
        schedule: its scales hold the L tokens; a truncated one for the coarse segment of a rollout.
        options: what the loss is.
        old_log_probs: (B, L) at the rollout; None is on-policy: the ratio is 1 and keeps its gradient.
        reference_log_probs: (B, L) of the reference policy, for the estimators k2 and k3. Where `options.kl_weight` is
            0 the loss does not read a reference; one that is given is still measured.
        reference_head: the reference policy's head, for the exact KL.
        token_mask: (B, L) bool or 0..1, the tokens to train and how much; None trains all. What stands where the mask
            is 0 has no effect, NaN neither: hidden states, log-probabilities, references and (valid) tokens.
        mask_totals: (K,) sums of the mask over each scale's tokens in the whole batch, where this call has only some of
            its rows (a micro-batch, a process's share) and advantages of the whole: the losses and gradients of the
            parts then add up to the whole's. None: the call has all rows.
        first_scale: scales before it are scored and not trained: the fine segment of a rollout.
        temperature: the one that the tokens were drawn with.
        backend: see `fastvar.support()`.

    Returns:
        See `PolicyLoss`. Differentiable in the tensors of the head. In float32 (float64 for float64). Where nothing is
        trained the loss is 0 with zero gradients. Gradients are made together with the loss and kept until its backward
        pass, the weight's in float32: to measure alone, call it under `torch.no_grad()`.

    Raises:
        ValueError: shapes or settings that do not fit.

    Source: VAR RL Done Right (arXiv 2601.02256), equations 4 to 15; DeepSeekMath (arXiv 2402.03300); estimators:
        Schulman, Approximating KL divergence (2020); geometric-mean ratios: GSPO (arXiv 2507.18071).
    """
    op = "policy_loss"
    own = as_head(op, "head", head)
    hidden = own.hidden
    _checks.schedule(op, schedule)
    _checks.shape(op, "hidden", hidden, "B", schedule.num_tokens, "V" if own.weight is None else "E")
    batch, length = hidden.shape[:2]
    if not isinstance(options, PolicyLossOptions):
        _checks.fail(op, "options", "PolicyLossOptions", _checks.kind(options))
    if not torch.compiler.is_compiling():  # which cannot follow the check; there `_fake` makes it
        _check_options(options)
    if not 0 <= first_scale < len(schedule):
        _checks.fail(op, "first_scale", f"a scale from 0 to {len(schedule) - 1}", first_scale)
    per_token = {"old_log_probs": old_log_probs, "reference_log_probs": reference_log_probs, "token_mask": token_mask}
    for name, tensor in per_token.items():
        if tensor is not None:
            _checks.shape(op, name, tensor, batch, length)
            if name != "token_mask" or tensor.dtype != torch.bool:
                _checks.floating(op, name, tensor)
    if mask_totals is not None:
        _checks.shape(op, "mask_totals", mask_totals, len(schedule))
        _checks.floating(op, "mask_totals", mask_totals)
    _checks.shape(op, "advantages", advantages, batch)
    _checks.floating(op, "advantages", advantages)
    _checks.same_device(op, "hidden", hidden, **per_token, mask_totals=mask_totals, advantages=advantages)
    kl_weight, estimator = options.kl_weight, options.kl_estimator
    if estimator == "exact":
        if reference_log_probs is not None:
            _checks.fail(op, "reference_log_probs", "None: the exact KL takes reference_head", "a tensor")
        if kl_weight != 0 and reference_head is None:
            _checks.fail(op, "reference_head", "(hidden, weight, bias) or logits for the exact KL", None)
    else:
        if reference_head is not None:
            _checks.fail(op, "reference_head", f"None: kl_estimator={estimator!r} takes reference_log_probs", "a head")
        if kl_weight != 0 and reference_log_probs is None:
            _checks.fail(op, "reference_log_probs", f"a tensor, as kl_weight is {kl_weight}", None)

    own = checked(op, own, tokens, temperature)
    reference = checked_reference(op, own, reference_head)
    needs = needed(own)
    old_log_probs, reference_log_probs, token_mask, mask_totals = (
        None if t is None else t.detach() for t in (old_log_probs, reference_log_probs, token_mask, mask_totals)
    )
    call = PolicyLossCall(
        head=detached(own),
        tokens=tokens,
        advantages=advantages.detach(),
        schedule=schedule,
        options=options,
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        reference=reference,
        token_mask=token_mask,
        mask_totals=mask_totals,
        first_scale=first_scale,
        temperature=temperature,
        needs=needs,
    )
    results, chosen = _LOSS.run(call, backend)
    loss, *measured, log_probs, of_hidden, of_weight, of_bias = results
    loss = with_gradients(loss, own, (of_hidden, of_weight, of_bias), needs, chosen)
    kl, clip_fraction, entropy, *others = measured
    return PolicyLoss(loss, kl, clip_fraction, entropy, log_probs, *others)


@lru_cache(64)
def _check_options(options: PolicyLossOptions) -> None:
    check_fields(options, "policy_loss")
