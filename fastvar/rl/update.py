"""From a rollout to a gradient: the segment's tokens through the network, then the policy loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastvar.models import VAR
from fastvar.ops import PolicyLoss, policy_loss
from fastvar.rl.rollout import Rollout


@dataclass(frozen=True)
class LossOptions:
    """What a segment's loss is; see `fastvar.ops.policy_loss`."""

    normalise: str = "group"
    """Spread of the advantages: "group", "batch" or "none"."""
    spread_floor: float = 1e-4
    """Added to the standard deviation of the rewards."""
    panw_alpha: float = 0.6
    """Per-action normalisation: a scale's tokens weigh (h w)^-alpha; 0 weighs all tokens alike."""
    panw_normalisation: str = "per_segment"
    """"per_segment", "per_scale" or "none"."""
    clip_low: float = 0.2
    """How far a ratio may fall below 1."""
    clip_high: float = 0.2
    """How far a ratio may rise above 1."""
    ratio_level: str = "token"
    """Ratio per "token", "scale" or "sample"."""
    kl_weight: float = 0.0
    """Weight of the KL to the reference; 0 needs no reference."""
    kl_estimator: str = "exact"
    """"exact" over the whole vocabulary, "k2" or "k3"."""


def segment_loss(
    var: VAR,
    rollout: Rollout,
    options: LossOptions,
    *,
    group_size: int,
    temperature: float = 1.0,
    reference: VAR | None = None,
    on_policy: bool = True,
) -> PolicyLoss:
    """The policy loss of a rollout's segment; only its tokens and the coarser ones pass the network.

    Args:
        var: the policy, in evaluation mode: dropout would make it another one than was drawn from.
        rollout: what was drawn.
        options: the loss.
        group_size: G of the rollout.
        temperature: of the rollout.
        reference: the reference policy, needed where options.kl_weight is not 0.
        on_policy: the first update on a rollout: the ratio is 1 by construction. Later updates take the rollout's
            log-probabilities, which must be those of this forward pass.

    Raises:
        ValueError: a KL weight without a reference.
    """
    if options.kl_weight != 0 and reference is None:
        raise ValueError(f"segment_loss: reference: expected a model, as kl_weight is {options.kl_weight}, got None")
    tokens = rollout.tokens
    inputs = var.tokenizer.teacher_forcing(tokens)[:, : tokens.shape[1] - var.schedule.lengths[0]]
    hidden = var.hidden(rollout.prompts, inputs)
    head, log_probs = None, None
    if reference is not None and options.kl_weight != 0:
        with torch.no_grad():
            other = reference.hidden(rollout.prompts, inputs)
            if options.kl_estimator == "exact":
                head = (other, reference.head.weight, reference.head.bias)
            else:
                log_probs = reference(rollout.prompts, inputs, tokens=tokens, temperature=temperature).log_probs
    return policy_loss(
        hidden,
        var.head.weight,
        var.head.bias,
        tokens,
        rollout.returns.to(hidden.device),
        var.schedule.with_num_tokens(tokens.shape[1]),
        group_size=group_size,
        normalise=options.normalise,
        spread_floor=options.spread_floor,
        old_log_probs=None if on_policy else rollout.log_probs,
        reference_log_probs=log_probs,
        reference_head=head,
        token_mask=rollout.mask,
        first_scale=rollout.first_scale,
        panw_alpha=options.panw_alpha,
        panw_normalisation=options.panw_normalisation,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        ratio_level=options.ratio_level,
        kl_weight=options.kl_weight,
        kl_estimator=options.kl_estimator,
        temperature=temperature,
    )
