"""Handwriting scenes of numbers of several lengths: what regions of text are in pictures, in small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastvar.data.regions import quotas
from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.random import derive


class MixedScenes(Dataset[dict[str, Any]]):
    """Handwriting scenes of which given shares have numbers of 2 digits, of 3 and so on.

    Which scenes have how many digits follows from the seed. An item is a dict with image, text, reference and
    reference_position as `HandwritingScenes` has them, and regions, int64: its digits.

    Args:
        length: number of scenes.
        shares: by number of digits; see `fastvar.data.regions.quotas`.
        options: those of `HandwritingScenes` but for its digits.

    Raises:
        ValueError: as there.
    """

    def __init__(self, *, length: int, shares: Mapping[int, float], seed: int = 0, **options: Any) -> None:
        counts = quotas(shares, length)
        digits = torch.tensor([number for number, count in counts.items() for _ in range(count)])
        order = torch.randperm(length, generator=torch.Generator().manual_seed(derive(seed, "digits")))
        self._regions = digits[order]
        self._scenes = {
            number: HandwritingScenes(length=length, digits=number, seed=seed, **options) for number in counts
        }
        one = next(iter(self._scenes.values()))
        self.length, self.seed, self.size, self.split = length, seed, one.size, one.split
        self.reference_place = one.reference_place
        self.digits, self.shares = tuple(counts), tuple(shares[number] for number in counts)

    @property
    def text_length(self) -> int:
        """The digits of the longest numbers."""
        return max(self.digits)

    @property
    def regions(self) -> list[int]:
        """The digits of each item."""
        return self._regions.tolist()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[0] for name, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Items stacked on a new first axis; `text` is a list."""
        rows = torch.as_tensor(indices)
        regions = self._regions[rows]
        parts = []
        for number in regions.unique().tolist():
            places = (regions == number).nonzero()[:, 0]
            parts.append((places, self._scenes[number].batch(rows[places])))
        order = torch.cat([places for places, _ in parts]).argsort()
        texts = [text for _, part in parts for text in part["text"]]
        stacked = {
            name: torch.cat([part[name] for _, part in parts])[order]
            for name in ("image", "reference", "reference_position")
        }
        return {**stacked, "text": [texts[place] for place in order.tolist()], "regions": regions}
