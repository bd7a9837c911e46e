"""Means and spreads of scores of which some are missing: NaN and infinite ones, everywhere in fastvar."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Centred(NamedTuple):
    """Rows about their means, in float64.

    Attributes:
        mean: (n, 1) of the scores that a row has; NaN where all are missing.
        deviations: (n, m) from the mean; exactly 0 where a row's scores are all equal, and for missing ones.
        spread: (n, 1), the standard deviation of the population; NaN where all are missing.
    """

    mean: torch.Tensor
    deviations: torch.Tensor
    spread: torch.Tensor


def centred(scores: torch.Tensor) -> Centred:
    """Scores (n, m), any floating dtype, about the mean of each row; without gradient.

    All is computed from (score - middle) / half of the range, at most 1: nothing overflows, and a common offset takes
    no digits but those that it took from the scores.
    """
    scores = scores.detach().double()
    if not scores.shape[1]:
        nothing = scores.new_full((len(scores), 1), math.nan)
        return Centred(nothing, scores, nothing)
    valid = scores.isfinite()
    highest = torch.where(valid, scores, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(valid, scores, math.inf).amin(1, keepdim=True)
    varied = highest > lowest
    middle, half = highest / 2 + lowest / 2, torch.where(varied, highest / 2 - lowest / 2, 1)
    moved = torch.where(valid & varied, (scores - middle) / half, 0)  # [-1, 1]
    count = valid.sum(1, keepdim=True)
    offset = moved.sum(1, keepdim=True) / count  # NaN where all are missing
    moved = torch.where(valid & varied, moved - offset, 0)
    return Centred(middle + half * offset, moved * half, (moved.square().sum(1, keepdim=True) / count).sqrt() * half)
