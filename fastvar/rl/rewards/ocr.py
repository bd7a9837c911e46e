"""The reward for rendering text: what a reader reads against what should be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

import torch

from fastvar.builtin import DEFAULT_READER, READERS
from fastvar.data import Reader
from fastvar.data.metrics import edit_similarity
from fastvar.data.prompt_sets import words_to_show
from fastvar.rl.rewards.base import Description, Reward, description_of, register

PENALTY = 0.6


def ocr_score(truth: Sequence[str], read: Sequence[tuple[str, float]]) -> float:
    """R = Comp + Sim - Pen for the words of one image, compared in lower case.

    Comp is the mean over true words of the smallest confidence among equal readings, 0 if there is none; Sim the mean
    over true words of LD(g, p) s_p for the reading p nearest to g (the more confident one of equally near ones), with
    LD = 1 - edit distance / longer length; Pen = 0.6 times the size of the difference of the two bags of characters,
    over the size of both. What is read too much is so paid for: repeating the word does not help.

    Args:
        truth: the words that should be there.
        read: the words that were read, with their confidences in [0, 1].

    Returns:
        from -0.6 (nothing right) to 2 (all read with confidence 1).

    Source: VAR RL Done Right (arXiv 2601.02256); it leaves open what the penalty is divided by.
    """
    goal = [word.lower() for word in truth]
    readings = [(word.lower(), confidence) for word, confidence in read]
    if not goal:
        raise ValueError("ocr_score: truth: expected at least one word, got none")
    complete = similar = 0.0
    for word in goal:
        complete += min((confidence for other, confidence in readings if other == word), default=0.0)
        nearest = max(
            ((edit_similarity(word, other), confidence) for other, confidence in readings), default=(0.0, 0.0)
        )
        similar += nearest[0] * nearest[1]
    right, written = Counter("".join(goal)), Counter("".join(word for word, _ in readings))
    difference = (right - written).total() + (written - right).total()
    penalty = PENALTY * difference / max(right.total() + written.total(), 1)
    return (complete + similar) / len(goal) - penalty


@register("ocr")
class OCRReward:
    """Reads images and compares with the words that the prompt asks for: those between quotes, or all of a prompt
    without quotes (`fastvar.data.prompt_sets.words_to_show`). The mask is the boxes of what was read.

    Args:
        reader: a `fastvar.data.Reader`, or the name of one in `fastvar.builtin.READERS`, such as "easyocr" (a package
            of its own, see `EasyOCRReader`).
        options: for a reader by its name.

    Raises:
        ImportError: the reader's package is not installed.
        ValueError: an unknown name, or options for a reader that is there already.
    """

    def __init__(self, reader: Reader | str = DEFAULT_READER, **options: Any) -> None:
        if isinstance(reader, str):
            if reader not in READERS:
                raise ValueError(f"OCRReward: reader: expected one of {tuple(READERS)}, got {reader!r}")
        elif options:
            raise ValueError(f"OCRReward: options: expected none beside a reader, got {sorted(options)}")
        self._reader_name = reader if isinstance(reader, str) else type(reader).__name__
        self.reader: Reader = resolve_name(READERS[reader])(**options) if isinstance(reader, str) else reader

    @property
    def description(self) -> Description:
        """Which reader."""
        own = Description(f"those of the reader {self._reader_name}", "the reader's own")
        scores = f"{-PENALTY} to 2; 2 where all is read, and nothing else"
        return description_of(self.reader, own)._replace(range=scores)

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise a ValueError for a text without a word."""
        for text in texts:
            if not words_to_show(text):
                raise ValueError(f"OCRReward: prompts: expected at least one word in each, got {text!r}")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None = None) -> Reward:
        """Score images (B, 3, H, W) in [0, 1] by the words of their prompts. An image in which nothing was read has a
        mask of ones: the fault may lie anywhere."""
        readings = self.reader(images)
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        scores = []
        for row, (reading, prompt) in enumerate(zip(readings, prompts, strict=True)):
            words = list(zip(reading.words, reading.word_confidences, strict=True))
            scores.append(ocr_score(words_to_show(prompt), words))
            for left, top, right, bottom in reading.boxes.tolist():
                rows = slice(max(int(top), 0), max(int(-(-bottom // 1)), 0))
                columns = slice(max(int(left), 0), max(int(-(-right // 1)), 0))
                mask[row, rows, columns] = True
            if not mask[row].any():
                mask[row] = True
        return Reward(torch.tensor(scores, dtype=torch.float32), mask)
