"""Handwriting scenes: numbers written with real scanned digits, with boxes and a subject reference for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastvar.handwriting.rendering import Placement, most_digits
from fastvar.handwriting.scans import scans_by_class
from fastvar.handwriting.scene import Scenes, draw_scenes, render_candidates, render_references, render_scenes

Item = dict[str, Any]
Indices = Sequence[int] | Tensor | NDArray[np.int64]

_SPLITS = {"train": 0, "test": 1, "reader": 2}
_FOR_SCENES, _FOR_CANDIDATES = 0, 1  # what draws are for: a part of their key
_MOST_DIGITS = 18  # the label must fit int64


class HandwritingScenes(Dataset[Item]):
    """Numbers of scanned digits on coloured paper. Real handwriting (UCI, with scikit-learn); no download.

    Item i depends on (seed, split, i, size, digits) alone: not on a global random state, a worker or the batch. The
    digits of the two splits come from disjoint scans, and `fastvar.handwriting.Reader` has seen neither's.

    Args:
        length: number of scenes.
        size: (H, W) or one int, pixels; 32 x 32 holds up to three digits.
        digits: D, the digits of every number; leading zeros are written.
        split: "train" or "test" ("reader" is the part that the reader learns from).
        seed: any integer.
        reference_place: "own" (a reference has its own place and size) or "scene" (those of its digit in the scene).

    An item is a dict:
        image: (3, H, W) float32 in [-1, 1];
        label: int64, the number, 0 .. 10**D - 1;
        text: str of D digits;
        boxes: (D, 4) float32, x0, y0, x1, y1 in pixels, tight around the ink of each digit;
        reference: (3, H, W) float32 in [-1, 1], one digit of the scene: the same scan, ink, slant and pen, but its own
            paper and, unless `reference_place` is "scene", its own place and size;
        reference_position: int64, which digit of the text that is;
        scans: (D,) int64, scan indices as in `scan_partition`.

    Raises:
        ValueError: an unknown split or reference place, a length below 1, or more digits than the size can show
            legibly.
    """

    def __init__(
        self,
        *,
        length: int,
        size: int | Sequence[int] = (32, 32),
        digits: int = 2,
        split: str = "train",
        seed: int = 0,
        reference_place: str = "own",
    ) -> None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"HandwritingScenes: size: expected a positive int or (height, width), got {size!r}")
        if split not in _SPLITS:
            raise ValueError(f"HandwritingScenes: split: expected one of {sorted(_SPLITS)}, got {split!r}")
        if reference_place not in ("own", "scene"):
            raise ValueError(f'HandwritingScenes: reference_place: expected "own" or "scene", got {reference_place!r}')
        if length < 1:
            raise ValueError(f"HandwritingScenes: length: expected at least 1, got {length}")
        most = min(most_digits(*sides), _MOST_DIGITS)
        if not 1 <= digits <= most:
            expected = f"1 to {most}" if most else "a larger size (not one digit would be legible)"
            raise ValueError(f"HandwritingScenes: digits: expected {expected} at {sides[0]}x{sides[1]}, got {digits}")
        self.length = length
        self.size: tuple[int, int] = (sides[0], sides[1])
        self.digits = digits
        self.split = split
        self.seed = seed
        self.reference_place = reference_place
        self._by_class = scans_by_class(split)

    @property
    def num_classes(self) -> int:
        """10**D: one class for each number."""
        return int(10**self.digits)

    @property
    def text_length(self) -> int:
        """D, the characters of an item's text: what a model that is trained on it has to write."""
        return self.digits

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Items of several indices, rendered together: `torch.utils.data.DataLoader` fetches batches with this."""
        batch = self.batch(indices)
        return [{name: values[row] for name, values in batch.items()} for row in range(len(indices))]

    def batch(self, indices: Indices) -> Item:
        """Items stacked on a new first axis; `text` is a list. The fastest way to draw many.

        Raises IndexError for an index outside [-length, length).
        """
        rows = self._rows(indices)
        scenes = self._draw(rows)
        images, boxes = render_scenes(scenes, self.size)
        references = render_references(
            scenes.subject_scans, scenes.hand, scenes.reference_draws, self.size, self._place(scenes)
        )
        powers = 10 ** np.arange(self.digits - 1, -1, -1, dtype=np.int64)
        labels = (scenes.digits * powers).sum(axis=1)
        return {
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(labels),
            "text": [f"{label:0{self.digits}d}" for label in labels],
            "boxes": torch.from_numpy(boxes),
            "reference": torch.from_numpy(references),
            "reference_position": torch.from_numpy(scenes.position),
            "scans": torch.from_numpy(scenes.scans),
        }

    def candidates(self, indices: Indices, count: int) -> dict[str, Tensor]:
        """References to tell apart, for `match_reference`: each item's own, hidden among others of the same digit.

        The others show different scans of that digit in different inks, written with the same slant and pen (and, if
        `reference_place` is "scene", at the same place and size), so that the scan alone makes the shape.
        Deterministic, as the items are.

        Args:
            indices: (B,) items.
            count: N >= 2, at most the scans of a digit in this split.

        Returns:
            images (B, N, 3, H, W) float32 in [-1, 1]; answers (B,) int64, where an item's own reference stands;
            positions (B,) int64, which digit of the text it shows.
        """
        fewest = min(len(scans) for scans in self._by_class)
        if not 2 <= count <= fewest:
            raise ValueError(f"HandwritingScenes: count: expected 2 to {fewest} candidates, got {count}")
        rows = self._rows(indices)
        scenes = self._draw(rows)
        images, answers = render_candidates(
            scenes, self._by_class, self._key(_FOR_CANDIDATES), rows, count, self.size, self._place(scenes)
        )
        return {
            "images": torch.from_numpy(images),
            "answers": torch.from_numpy(answers),
            "positions": torch.from_numpy(scenes.position),
        }

    def _key(self, purpose: int) -> tuple[int, ...]:
        return (self.seed, _SPLITS[self.split], self.digits, purpose)

    def _rows(self, indices: Indices) -> NDArray[np.int64]:
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if rows.size and (rows.min() < -self.length or rows.max() >= self.length):
            raise IndexError(f"HandwritingScenes: index: expected -{self.length} to {self.length - 1}, got {indices}")
        return np.where(rows < 0, rows + self.length, rows)

    def _draw(self, rows: NDArray[np.int64]) -> Scenes:
        return draw_scenes(self._by_class, self._key(_FOR_SCENES), rows, self.digits, self.size)

    def _place(self, scenes: Scenes) -> Placement | None:
        """Where the references show their digit; None draws a place for each."""
        return scenes.subject_place if self.reference_place == "scene" else None
