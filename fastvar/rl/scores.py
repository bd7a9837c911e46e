"""What a rollout's images are worth, and where in them that was decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvar.ops import propagate_mask
from fastvar.rl.rewards import Reward, RewardSum
from fastvar.rl.rollout import Rollout
from fastvar.schedule import ScaleSchedule


class Scores(NamedTuple):
    """What rewards say of a rollout of n segments with K continuations each.

    Attributes:
        each: by name, a reward's own scores (n K,) float64; NaN where it has nothing to say. `RewardSum.combine` adds
            them up.
        mask: (n, L') bool, which tokens lie where the scores were decided, or None for all.
    """

    each: dict[str, torch.Tensor]
    mask: torch.Tensor | None


def score(
    rollout: Rollout,
    reward: RewardSum,
    schedule: ScaleSchedule,
    *,
    use_mask: bool = False,
    known: Mapping[str, Reward] | None = None,
) -> Scores:
    """Score a rollout's images.

    Args:
        rollout: n segments.
        reward: what scores.
        schedule: of the whole image.
        use_mask: keep the rewards' mask, propagated over the scales. A token of a coarse segment is on if it is for
            any of its continuations.
        known: by name what rewards have said already of the rollout's images.

    Raises:
        RuntimeError: names a reward that misbehaved.
    """
    prompts = rollout.prompts.repeated(rollout.continuations)
    each, mask = reward.ask(rollout.images, prompts.texts, prompts.references, known=known)
    if mask is None or not use_mask:
        return Scores(each, None)
    finest = F.adaptive_max_pool2d(mask.float()[:, None], schedule.finest)[:, 0] > 0  # a cell with a pixel that is on
    length = rollout.tokens.shape[1]
    tokens = propagate_mask(finest, schedule)[:, :length].view(-1, rollout.continuations, length).any(1)
    return Scores(each, tokens.to(rollout.tokens.device))
