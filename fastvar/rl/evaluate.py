"""How good a policy is: rewards and diversity on fixed prompts and seeds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.data.metrics import diversity, mean_interval
from fastvar.models import VAR
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rollout import RolloutOptions, roll_out

PER_PROMPT = 4
SEED = 2**31 - 3  # rollouts of training draw other seeds


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        images: (N, 3, H, W) in [0, 1], four of a prompt adjacent.
        prompts: N.
        metrics: the mean "return" (weighted sum of the rewards), each reward's mean by name, and "diversity", see
            `fastvar.data.metrics.diversity`.
        intervals: 95 % intervals of the rewards' means and of the diversity.
    """

    images: torch.Tensor
    prompts: Prompts
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def evaluate_policy(
    var: VAR, reward: RewardSum, prompts: Prompts, *, samples: int, options: RolloutOptions, seed: int = SEED
) -> Evaluation:
    """Draw four images of each of samples / 4 prompts, spread evenly over all, and score them.

    Args:
        var: the policy, in evaluation mode.
        reward: what scores.
        prompts: to choose from.
        samples: images, rounded up to a multiple of four.
        options: how to draw.
        seed: of the samples; always the same images for the same weights.
    """
    groups = -(-samples // PER_PROMPT)
    chosen = prompts.take([i * len(prompts) // groups for i in range(groups)])
    drawn = roll_out(var, chosen, group_size=PER_PROMPT, seed=seed, options=options)
    each, _ = reward.ask(drawn.images, drawn.prompts.texts, drawn.prompts.references)
    metrics = {"return": float(reward.combine(each).nanmean())}
    intervals = {}
    for name, scores in each.items():
        finite = scores[scores.isfinite()].tolist()
        metrics[name], intervals[name] = sum(finite) / len(finite), mean_interval(finite)
    spread = diversity(drawn.images, PER_PROMPT)
    metrics["diversity"], intervals["diversity"] = sum(spread) / len(spread), mean_interval(spread)
    return Evaluation(drawn.images.cpu(), drawn.prompts, metrics, intervals)
