"""How well texts were read, and how much images differ; intervals of proportions and means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import torch

from fastvar.data.reader import Reading

_NORMAL_95 = 1.959963984540054  # two-sided quantile of the normal distribution


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters."""
    previous = list(range(len(second) + 1))
    for row, a in enumerate(first, 1):
        current = [row]
        for column, b in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (a != b)))
        previous = current
    return previous[-1]


def edit_similarity(first: str, second: str) -> float:
    """1 - edit distance / length of the longer text, in [0, 1]; 1 for two empty texts."""
    longest = max(len(first), len(second))
    return 1 - edit_distance(first, second) / longest if longest else 1.0


def word_accuracy(readings: Sequence[Reading | str], texts: Sequence[str]) -> float:
    """Share of texts that were read exactly.

    readings: what a `Reader` returned, or plain texts; texts: the truth, in the same order.
    Raises ValueError if they differ in number or are none.
    """
    return fmean(read == text for read, text in _pairs("word_accuracy", readings, texts))


def normalised_edit_distance(readings: Sequence[Reading | str], texts: Sequence[str]) -> float:
    """NED as papers on text rendering report it: the mean of 1 - edit distance / length of the longer text.

    In spite of its name it is a similarity: 1 is perfect, 0 is all wrong. Arguments and errors as `word_accuracy`.
    """
    return fmean(edit_similarity(read, text) for read, text in _pairs("normalised_edit_distance", readings, texts))


def diversity(images: torch.Tensor, group_size: int) -> list[float]:
    """For each group of images, the mean over its pairs of the root mean square difference of their pixels.

    0 where a prompt always gives the same image. Images of a group should show the same prompt.

    images: (N, 3, H, W) in [0, 1], the G of a group adjacent; group_size: G, at least 2, divides N.
    Raises ValueError for another number of images.
    """
    if group_size < 2 or not len(images) or len(images) % group_size:
        raise ValueError(f"diversity: images: expected groups of {group_size} (at least 2), got {len(images)} images")
    groups = images.float().flatten(1).view(-1, group_size, images[0].numel())
    pairs = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist") / groups.shape[2] ** 0.5
    return (pairs.sum((1, 2)) / (group_size * (group_size - 1))).tolist()


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (E. B. Wilson, 1927): honest at 0 and 1 and for few trials.

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval: successes: expected 0 <= successes <= trials, got {successes} of {trials}")
    share, z2 = successes / trials, _NORMAL_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _NORMAL_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean, by the normal approximation: mean -+ 1.96 standard deviations / sqrt(n).

    Raises ValueError for fewer than two values.
    """
    sample = [float(value) for value in values]
    if len(sample) < 2:
        raise ValueError(f"mean_interval: values: expected at least 2, got {len(sample)}")
    centre, half = fmean(sample), _NORMAL_95 * stdev(sample) / math.sqrt(len(sample))
    return centre - half, centre + half


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of sum(parts) / sum(wholes), such as the words that were read of those of all images.

    By the normal approximation, with the spread over pairs of part - ratio * whole (the delta method): what belongs to
    one image is not independent. Raises ValueError for fewer than two pairs, or wholes that add up to nothing.
    """
    if len(parts) != len(wholes) or len(parts) < 2 or not sum(wholes) > 0:
        raise ValueError(
            f"ratio_interval: wholes: expected as many as parts, at least 2, above 0 in all, got {len(wholes)} of "
            f"{len(parts)}, {sum(wholes)} in all"
        )
    ratio = sum(parts) / sum(wholes)
    rest = [part - ratio * whole for part, whole in zip(parts, wholes, strict=True)]
    half = _NORMAL_95 * stdev(rest) * math.sqrt(len(rest)) / sum(wholes)
    return ratio - half, ratio + half


def _pairs(name: str, readings: Sequence[Reading | str], texts: Sequence[str]) -> list[tuple[str, str]]:
    if len(readings) != len(texts) or not texts:
        raise ValueError(
            f"{name}: readings: expected as many as texts, at least 1, got {len(readings)} and {len(texts)}"
        )
    read = [reading if isinstance(reading, str) else reading.text for reading in readings]
    return list(zip(read, texts, strict=True))
