"""What each part of the method does to the gradient, without training: balance over scales, signal against noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastvar.models import VAR, SamplingOptions
from fastvar.ops import group_advantages
from fastvar.rl import LossOptions, Prompts, middle_returns, roll_out, score, segment_loss, token_totals
from fastvar.rl.rewards import ColourReward, RewardSum
from tests.helpers.policies import policy

GRIDS = ((1, 1), (2, 2), (4, 4), (8, 8))
SIZE, PROMPTS = 16, Prompts(["1", "2"])


def gradient(var: VAR, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(var.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def drawn_gradient(
    var: VAR, reward: RewardSum, segment: Any, seed: int, *, first_scale: int = 0, use_mask: bool = False
) -> torch.Tensor:
    """The gradient that one rollout gives, of the scales from `first_scale` on."""
    rollout = roll_out(
        var, PROMPTS, segment=segment, middle=2, group_size=SIZE, seed=seed, options=SamplingOptions()
    )._replace(first_scale=first_scale)
    scores = score(rollout, reward, var.schedule, use_mask=use_mask)
    advantages = group_advantages(middle_returns(reward.combine(scores.each), 1), SIZE)
    mask = None if scores.mask is None else scores.mask.float()
    return gradient(var, segment_loss(var, rollout, advantages, LossOptions(), mask=mask).loss)


def signal(draw: Callable[[int], torch.Tensor], count: int = 24) -> tuple[float, torch.Tensor]:
    """Squared norm of the mean gradient over the variance of one, without the bias of few draws; and the mean."""
    drawn = torch.stack([draw(3 * i) for i in range(count)])
    mean, noise = drawn.mean(0), drawn.var(0).sum()
    return float((mean.square().sum() - noise / count) / noise), mean


def test_panw_balances_the_gradient_over_the_scales() -> None:
    """By the norm of each scale's part of the gradient of the weights: the largest against the smallest."""
    var = policy(grids=GRIDS)
    rollout = roll_out(var, PROMPTS, group_size=SIZE, seed=1, options=SamplingOptions())
    advantages = torch.randn(2 * SIZE, generator=torch.Generator().manual_seed(0))
    totals = token_totals(torch.ones_like(rollout.log_probs), var.schedule)
    spread = {}
    for alpha in (0.0, 0.6):
        norms = []
        for start, end in zip(var.schedule.starts, var.schedule.ends, strict=True):
            mask = torch.zeros_like(rollout.log_probs)
            mask[:, start:end] = 1
            options = LossOptions(panw_alpha=alpha)
            loss = segment_loss(var, rollout, advantages, options, mask=mask, mask_totals=totals).loss
            norms.append(float(gradient(var, loss).norm()))
        spread[alpha] = max(norms) / min(norms)
    assert spread[0.6] < spread[0.0] / 4, spread


def test_shared_coarse_state_raises_the_fine_segments_signal() -> None:
    """What the coarse scales decide is noise to the fine ones, unless the whole group has the same."""
    var, reward = policy(grids=GRIDS), RewardSum({"red": ColourReward()})
    plain, _ = signal(lambda seed: drawn_gradient(var, reward, "whole", seed, first_scale=2))
    shared, _ = signal(lambda seed: drawn_gradient(var, reward, "fine", seed, first_scale=2))
    assert shared > 1.5 * max(plain, 0), (shared, plain)


def test_mask_raises_a_local_rewards_signal_and_keeps_its_direction() -> None:
    var, reward = policy(grids=GRIDS), RewardSum({"corner": ColourReward(region=(0.0, 0.0, 0.25, 0.25))})
    plain, mean = signal(lambda seed: drawn_gradient(var, reward, "whole", seed))
    masked, masked_mean = signal(lambda seed: drawn_gradient(var, reward, "whole", seed, use_mask=True))
    cosine = torch.cosine_similarity(mean, masked_mean, 0)
    assert masked > 1.5 * max(plain, 0) and cosine > 0.5, (masked, plain, cosine)
