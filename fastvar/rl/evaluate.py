"""How good a policy is: rewards and diversity on fixed prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvar.data.metrics import diversity, mean_interval
from fastvar.models import Model, SamplingOptions
from fastvar.rl.preflight import check_prompts
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rollout import Rollout, roll_out

PER_PROMPT = 4
SEED = 2**31 - 3  # of every run, so that their evaluations can be compared


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        images: (N, 3, H, W) in [0, 1], four of a prompt adjacent.
        prompts: N.
        metrics: the mean "return" (weighted sum of the rewards, not standardised), each reward's mean by name, and
            "diversity", see `fastvar.data.metrics.diversity`. Held-out rewards are under "held_out/NAME".
        intervals: 95 % intervals of the rewards' means and of the diversity, over prompts.
    """

    images: torch.Tensor
    prompts: Prompts
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Part(NamedTuple):
    """A process's share of an evaluation: whole prompts, on the CPU."""

    images: torch.Tensor
    prompts: Prompts
    each: dict[str, torch.Tensor]


def evaluate_policy(
    var: Model, reward: RewardSum, prompts: Prompts, *, samples: int, options: SamplingOptions, seed: int = SEED
) -> Evaluation:
    """Draw four images of each of samples / 4 prompts, spread evenly over all, and score them.

    Args:
        var: the policy, in evaluation mode.
        reward: what scores.
        prompts: to choose from.
        samples: images, rounded up to a multiple of four, at least 8.
        options: how to draw.
        seed: of the samples; always the same images for the same weights.

    Raises:
        ValueError: a prompt that the model cannot draw.
        RuntimeError: names a reward that misbehaved.
    """
    check_prompts(var, prompts)
    drawn = draw_evaluation(var, prompts, samples=samples, options=options, seed=seed)
    return summarise([score_evaluation(drawn, reward)], reward)


def draw_evaluation(
    var: Model,
    prompts: Prompts,
    *,
    samples: int,
    options: SamplingOptions,
    seed: int = SEED,
    share: tuple[int, int] = (0, 1),
) -> Rollout:
    """The images of an evaluation; arguments as `evaluate_policy`. share: (i, n) for the i-th of n parts, of which some
    may have no image; as many are drawn for each, as the passes of a sharded model are made together."""
    groups = -(-samples // PER_PROMPT)
    part, parts = share
    first, end = part * groups // parts, (part + 1) * groups // parts
    chosen = prompts.take([i * len(prompts) // groups for i in range(groups)])
    rows = range(first * PER_PROMPT, (first + -(-groups // parts)) * PER_PROMPT)
    drawn = roll_out(var, chosen, group_size=PER_PROMPT, seed=seed, options=options, rows=rows)
    own = (end - first) * PER_PROMPT
    if own == len(rows):
        return drawn
    kept = {name: getattr(drawn, name)[:own] for name in ("tokens", "log_probs", "images", "rows")}
    return drawn._replace(**kept, prompts=drawn.prompts.take(range(max(own, 1))))  # there is always one


def score_evaluation(drawn: Rollout, reward: RewardSum) -> Part:
    """Scores of drawn images."""
    each: dict[str, torch.Tensor] = {}
    if len(drawn.images):
        each, _ = reward.ask(drawn.images, drawn.prompts.texts, drawn.prompts.references, held_out=True)
    return Part(drawn.images.cpu(), drawn.prompts, {name: scores.cpu() for name, scores in each.items()})


def summarise(parts: Sequence[Part], reward: RewardSum) -> Evaluation:
    """The parts put together."""
    parts = [part for part in parts if len(part.images)]
    images = torch.cat([part.images for part in parts])
    prompts = Prompts.joined([part.prompts for part in parts])
    each = {name: torch.cat([part.each[name] for part in parts]) for name in parts[0].each}
    reward.check(each)
    metrics = {"return": float(reward.combine(each, standardise=False).nanmean())}
    intervals = {}
    for asked, scores in each.items():
        name = f"held_out/{asked}" if asked in reward.held_out else asked
        metrics[name] = float(scores.nanmean())
        groups = scores.view(-1, PER_PROMPT).nanmean(1)
        known = groups[groups.isfinite()].tolist()
        intervals[name] = mean_interval(known) if len(known) > 1 else (math.nan, math.nan)
    spread = diversity(images, PER_PROMPT)
    metrics["diversity"], intervals["diversity"] = sum(spread) / len(spread), mean_interval(spread)
    return Evaluation(images, prompts, metrics, intervals)
