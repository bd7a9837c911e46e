"""The reward for following a reference subject in handwriting: a character with its shape and ink."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvar.data.matching import subject_distances
from fastvar.rl.rewards.base import Reward, register

FARTHEST = 4.0  # distances from here on are as bad as no character at all


@register("subject")
class SubjectReward:
    """How near the most similar character of an image is to its reference's, by shape and ink; handwriting only.

    Copying the reference whatever the prompt says scores best: weigh it against a reward for the text, and watch the
    diversity. For photographs see "dino" and "clip-i".
    """

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None = None) -> Reward:
        """Score images (B, 3, H, W) in [0, 1] against references (B, 3, h, w): minus the distance, from -4 (or no
        character) to 0; see `fastvar.data.matching.subject_distances`.

        Raises:
            ValueError: no references.
        """
        if references is None:
            raise ValueError("SubjectReward: references: expected (B, 3, H, W), got None")
        distances = subject_distances(images.detach().float().cpu(), references.detach().float().cpu())
        return Reward(-distances.clamp_max(FARTHEST))
