"""What reads texts off images, and what it says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """What was read from one image: at most one word of n characters, left to right.

    text: the word, "" if nothing was read; boxes: (n, 4) float32, x0, y0, x1, y1 in pixels; confidences: (n,) float32
    in [0, 1], the probability of each character; word_confidence: of the whole word (0 for an empty reading).
    """

    text: str
    boxes: Tensor
    confidences: Tensor
    word_confidence: float

    @property
    def words(self) -> list[str]:
        """The words: one or none."""
        return [self.text] if self.text else []

    @property
    def word_boxes(self) -> Tensor:
        """(words, 4) float32: the box around each word."""
        if not self.text:
            return self.boxes
        return torch.cat([self.boxes[:, :2].amin(dim=0), self.boxes[:, 2:].amax(dim=0)])[None]

    @property
    def word_confidences(self) -> list[float]:
        """The confidence of each word."""
        return [self.word_confidence] if self.text else []


class Reader(Protocol):
    """A callable that reads texts off images."""

    def __call__(self, images: Tensor, /) -> Sequence[Reading]:
        """A reading of each image (B, 3, H, W) in [0, 1]."""
