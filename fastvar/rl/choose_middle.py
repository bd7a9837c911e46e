"""Where to split an image into coarse and fine scales: how much of a reward's spread the coarse state decides."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.models import Model, SamplingOptions
from fastvar.rl.preflight import check_prompts
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rollout import roll_out
from fastvar.rl.scores import score

ENOUGH = 0.5
_SEED = 2**31 - 5


class MiddleShare(NamedTuple):
    """How much the scales before `middle` decide.

    Attributes:
        middle: m.
        share: of the variance of one image's reward among images of a prompt, how much the coarse state explains (the
            intra-class correlation); 0 to 1, slightly below 0 by chance.
        averaged: the same of the mean over K continuations (Spearman and Brown): what a coarse segment's return is
            worth as a signal.
    """

    middle: int
    share: float
    averaged: float


def explained_shares(
    model: Model,
    reward: RewardSum,
    prompts: Prompts,
    *,
    prefixes: int = 6,
    continuations: int = 8,
    averaged_over: int = 2,
    options: SamplingOptions,
    seed: int = _SEED,
) -> list[MiddleShare]:
    """Draw coarse states of every prompt and continuations of each, for every middle scale, and divide the variance.

    Args:
        model: the policy, in evaluation mode.
        reward: what scores.
        prompts: each is drawn (len(prompts) x prefixes x continuations images for each middle scale).
        prefixes: coarse states of a prompt, at least 2.
        continuations: of a coarse state, at least 2.
        averaged_over: K of the training.
        options: how to draw.
        seed: of the draws.

    Returns:
        one `MiddleShare` for each m from 1 to K - 1.

    Raises:
        ValueError: too few draws; a prompt that the model cannot draw; a reward that is the same for all images.

    Source: one-way random effects (R. A. Fisher); Spearman (1910) and Brown (1910) for the mean of several.
    """
    for name, value in (("prefixes", prefixes), ("continuations", continuations)):
        if value < 2:
            raise ValueError(f"explained_shares: {name}: expected at least 2, got {value}")
    check_prompts(model, prompts)
    shares = []
    for middle in range(1, len(model.schedule)):
        drawn = roll_out(
            model,
            prompts,
            segment="coarse",
            group_size=prefixes,
            middle=middle,
            continuations=continuations,
            seed=seed,
            options=options,
        )
        each = score(drawn, reward, model.schedule).each
        share = intraclass_correlation(reward.combine(each).view(len(prompts), prefixes, continuations))
        averaged = averaged_over * share / (1 + (averaged_over - 1) * share)
        shares.append(MiddleShare(middle, share, averaged))
    return shares


def intraclass_correlation(rewards: torch.Tensor) -> float:
    """ICC(1) of rewards (P, N, C): N classes of C members each within every prompt, variances pooled over the prompts.

    Raises:
        ValueError: rewards that are missing or all equal within every prompt.
    """
    rewards = rewards.double()
    if not rewards.isfinite().all():
        raise ValueError("explained_shares: reward: expected finite scores for all images")
    _, classes, members = rewards.shape
    means = rewards.mean(2)
    between = members * (means - means.mean(1, keepdim=True)).square().sum(1) / (classes - 1)
    within = (rewards - means[:, :, None]).square().sum((1, 2)) / (classes * (members - 1))
    total = between.mean() + (members - 1) * within.mean()
    if total == 0:
        raise ValueError("explained_shares: reward: expected one that differs between images, all scores are equal")
    return float((between.mean() - within.mean()) / total)


def recommended_middle(shares: list[MiddleShare]) -> int:
    """The smallest m whose averaged share passes one half: a coarse update trains the fewest tokens there. The m with
    the largest share if none does."""
    enough = [share.middle for share in shares if share.averaged >= ENOUGH]
    return enough[0] if enough else max(shares, key=lambda share: share.averaged).middle
