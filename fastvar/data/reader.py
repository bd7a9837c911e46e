"""A small optical character reader: images of handwriting in, words with boxes and confidences out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvar.data.characters import BORDER, JUNK, SIDE, CharacterClassifier
from fastvar.data.segmentation import check_images, segment

_CHUNK = 1024  # images a pass, so that memory stays bounded


@dataclass(frozen=True)
class Reading:
    """What was read from one image: at most one word of n characters, left to right.

    text: the word, "" if nothing was read; boxes: (n, 4) float32, x0, y0, x1, y1 in pixels; confidences: (n,) float32
    in [0, 1], the probability of each character; word_confidence: the least of them, times the share of the image's ink
    that the characters make up (0 for an empty reading).
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


class Reader:
    """Reads numbers: ink apart from paper, components, a classifier for each (`segmentation`, `characters`).

    The classifier is fitted at the first use in a process (a few seconds) to scans that no scene shows. A component
    that looks like no digit is left out; its ink lowers the word's confidence. Deterministic; runs on the CPU.

    Args:
        cache: a safetensors file: loaded if it is there, else written after fitting.

    Raises:
        ValueError: the cache file holds something else.
    """

    def __init__(self, cache: str | Path | None = None) -> None:
        if cache is not None and Path(cache).exists():
            self._classifier = CharacterClassifier.load(cache)
            return
        from fastvar.data.reader_training import trained_characters

        self._classifier = trained_characters()
        if cache is not None:
            self._classifier.save(cache)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Reading]:
        """Read images (B, 3, H, W), floats in [0, 1] on any device. Odd content gives empty or unsure readings.

        Raises ValueError for another shape, dtype or range, infinities or NaNs.
        """
        check_images(images, "Reader: images")
        return [reading for chunk in images.split(_CHUNK) for reading in self._read(chunk)]

    def _read(self, images: Tensor) -> list[Reading]:
        pages = segment(images)
        probabilities = self._classifier.probabilities(torch.from_numpy(pages.crops(SIDE, BORDER)))
        confidences, digits = probabilities[:, :JUNK].max(dim=1)
        legible = probabilities[:, JUNK] < 0.5
        boxes = torch.from_numpy(pages.image_boxes())
        areas = torch.from_numpy(pages.areas)
        readings = []
        for page in range(len(images)):
            characters = torch.arange(len(digits))[pages.of_page(page)]
            characters = characters[legible[characters]]
            if not len(characters):
                readings.append(Reading("", torch.zeros(0, 4), torch.zeros(0), 0.0))
                continue
            certain = confidences[characters]
            read = areas[characters].sum().item() / int(pages.ink[page])
            text = "".join(map(str, digits[characters].tolist()))
            readings.append(Reading(text, boxes[characters], certain, certain.min().item() * read))
        return readings
