"""From a rollout to a gradient: the segment's tokens through the network, then the policy loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from fastvar.models import Model
from fastvar.ops import PolicyLoss, PolicyLossOptions, policy_loss, token_log_probs
from fastvar.ops.token_log_probs import Head
from fastvar.rl.adapters import as_reference
from fastvar.rl.rollout import Rollout
from fastvar.rl.rows import taken
from fastvar.schedule import ScaleSchedule
from fastvar.training.sharded import called


def segment_loss(
    model: Model,
    rollout: Rollout,
    advantages: torch.Tensor,
    options: PolicyLossOptions,
    *,
    rows: Sequence[int] | None = None,
    mask: torch.Tensor | None = None,
    mask_totals: torch.Tensor | None = None,
    temperature: float = 1.0,
    reference: Model | None = None,
    old_log_probs: torch.Tensor | None = None,
) -> PolicyLoss:
    """The policy loss of a rollout's segments; only their tokens and the coarser ones pass the network.

    Args:
        model: the policy, in evaluation mode: dropout would make it another one than was drawn from.
        rollout: what was drawn, n rows.
        advantages: (n,).
        options: what the loss is.
        rows: the rows of the rollout that this call is for, in order; all by default.
        mask: (n, L') which tokens to train, or None for all of the segment's.
        mask_totals: (K',) as `token_totals` of all rows, if this call is for some of them.
        temperature: of the rollout.
        reference: the policy that the KL is measured to; `model` itself stands for it without its adapters. Not read
            where options.kl_weight is 0.
        old_log_probs: (n, L') of the policy that drew the rollout, for all but the first update on it; None is
            on-policy, where the ratio is 1 by construction. They must be those of this forward pass, not of sampling,
            if the two differ.

    Raises:
        ValueError: a KL weight without a reference.
    """
    if options.kl_weight != 0 and reference is None:
        raise ValueError(f"segment_loss: reference: expected a model, as kl_weight is {options.kl_weight}, got None")
    tensors = part_of(model, rollout, advantages, rows, mask, mask_totals, old_log_probs)
    return part_loss(model, options, rollout.first_scale, temperature, reference, **tensors)


def part_of(
    model: Model,
    rollout: Rollout,
    advantages: torch.Tensor,
    rows: Sequence[int] | None,
    mask: torch.Tensor | None,
    mask_totals: torch.Tensor | None,
    old_log_probs: torch.Tensor | None,
) -> dict[str, Any]:
    """What `part_loss` takes of some rows, or of all; arguments as `segment_loss`."""
    rows = list(range(len(rollout.tokens)) if rows is None else rows)
    subject = None
    if rollout.subject is not None:
        subject = taken(rollout.subject, rows[:: _rows_per_subject(rollout, rows)])
    return {
        "tokens": taken(rollout.tokens, rows),
        "conditions": model.take(rollout.conditions, rows),
        "subject": subject,
        "advantages": taken(advantages, rows),
        "mask": None if mask is None else taken(mask, rows),
        "mask_totals": mask_totals,
        "old_log_probs": None if old_log_probs is None else taken(old_log_probs, rows),
    }


def part_loss(
    model: Model,
    options: PolicyLossOptions,
    first_scale: int,
    temperature: float,
    reference: Model | None,
    *,
    tokens: torch.Tensor,
    conditions: Any,
    subject: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    mask_totals: torch.Tensor | None,
    old_log_probs: torch.Tensor | None,
) -> PolicyLoss:
    """The policy loss of rows that were taken before, from tensors on the device alone: nothing is copied there."""
    inputs = model.tokenizer.teacher_forcing(tokens)[:, : tokens.shape[1] - model.schedule.lengths[0]]
    head = _scored(model, conditions, inputs, subject)
    reference_head: Head | None = None
    reference_log_probs = None
    if reference is not None and options.kl_weight != 0:
        with torch.no_grad(), as_reference(reference, model):
            scored: Head = called(reference, _scored, conditions, inputs, subject)
            if options.kl_estimator == "exact":
                reference_head = scored
            else:
                reference_log_probs = token_log_probs(*scored, tokens, temperature=temperature).log_probs
    return policy_loss(
        head,
        tokens,
        advantages,
        model.schedule.with_num_tokens(tokens.shape[1]),
        options,
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        reference_head=reference_head,
        token_mask=mask,
        mask_totals=mask_totals,
        first_scale=first_scale,
        temperature=temperature,
    )


def _scored(model: Model, conditions: Any, inputs: torch.Tensor, subject: torch.Tensor | None) -> Head:
    return model.scored(model.hidden(conditions, inputs, subject=subject))


def _rows_per_subject(rollout: Rollout, rows: Sequence[int]) -> int:
    """How many adjacent rows can share one subject's prefix: those of a group, if all groups have as many."""
    counts = {len(list(members)) for _, members in groupby(rollout.rows[row] // rollout.group_size for row in rows)}
    return counts.pop() if len(counts) == 1 else 1


def token_totals(mask: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """(K',) float32: how much of each scale a mask (n, L') trains, as `policy_loss` takes it for a part of a batch."""
    return torch.stack([part.sum(dtype=torch.float32) for part in mask.split(schedule.lengths, 1)])
