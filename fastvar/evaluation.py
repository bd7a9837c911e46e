"""Samples of a model, and what a reader makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvar.bars import progress_bar
from fastvar.data import Reader, mean_interval, normalised_edit_distance, wilson_interval, word_accuracy
from fastvar.data.metrics import edit_similarity
from fastvar.models import Model, SamplingOptions

Interval = tuple[float, float]


GUIDED = SamplingOptions(guidance=2.0, top_p=0.9)  # how commands draw unless they are told otherwise


@dataclass(frozen=True)
class ReadingScore:
    """What the reader made of images that should show a text each.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        texts, readings: the truth and what was read, (N,).
        accuracy: share read exactly, with its 95 % interval.
        similarity: NED, mean of 1 - edit distance / longer length, with its 95 % interval.
    """

    images: torch.Tensor
    texts: list[str]
    readings: list[str]
    accuracy: float
    accuracy_interval: Interval
    similarity: float
    similarity_interval: Interval

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "images": len(self.texts),
            "word_accuracy": self.accuracy,
            "word_accuracy_95": self.accuracy_interval,
            "ned": self.similarity,
            "ned_95": self.similarity_interval,
        }


def _check_room(model: Model, rows: int, guided: bool) -> None:
    """Raise a ValueError where the keys and values alone, which a batch keeps, are more than the memory there is."""
    parameter, config = next(model.parameters()), model.config
    row = 2 * config.depth * model.schedule.num_tokens * config.embed_dim * parameter.element_size() * (1 + guided)
    if parameter.device.type == "cuda":
        room = torch.cuda.mem_get_info(parameter.device)[0] + torch.cuda.memory_reserved(parameter.device)
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * row > room:
        raise ValueError(
            f"draw: batch_size: expected at most {room // row}, whose keys and values fill {room / 2**30:.1f} GiB, "
            f"got {rows}"
        )


def draw(
    model: Model,
    prompts: Any,
    options: SamplingOptions,
    *,
    seed: int = 0,
    first_sample: int = 0,
    subject: torch.Tensor | None = None,
    negative: str | None = None,
    title: str = "sampling",
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N prompts, drawn in batches.

    Args:
        model: in evaluation mode.
        prompts: N classes or texts, as the model's `generate` takes them.
        options: how.
        seed: of the samples.
        first_sample: the number of the first one; a sample depends on the seed and its number.
        subject: (N, L, C) pyramids of reference subjects, or None.
        negative: the text that guidance keeps away from, for models of texts; None for what the model has learned.
        title: of the progress bar.
    """
    options.check()
    batches = model.batches(prompts, options.batch_size)  # all of them are checked before the first is drawn
    if not batches:
        raise ValueError("draw: prompts: expected at least one, got none")
    _check_room(model, model.count(model.encode(batches[0])), options.guides(model))
    images, start = [], 0
    for batch in progress_bar(batches, desc=title, leave=False):
        rows = slice(start, start + options.batch_size)
        away = {} if negative is None else {"negative": [negative] * model.count(model.encode(batch))}
        out = model.generate(
            batch,
            subject=None if subject is None else subject[rows],
            seed=seed,
            first_sample=first_sample + start,
            **away,
            **options.arguments(model),
        )
        assert out.images is not None  # they were decoded
        images.append(out.images.cpu())
        start += options.batch_size
    return torch.cat(images)


def score_reading(images: torch.Tensor, texts: Sequence[str], reader: Reader) -> ReadingScore:
    """Read images (N, 3, H, W) in [0, 1] and compare with the texts they should show."""
    readings = [reading.text for reading in reader(images)]
    texts = list(texts)
    right = sum(read == text for read, text in zip(readings, texts, strict=True))
    return ReadingScore(
        images,
        texts,
        readings,
        word_accuracy(readings, texts),
        wilson_interval(right, len(texts)),
        normalised_edit_distance(readings, texts),
        mean_interval([edit_similarity(read, text) for read, text in zip(readings, texts, strict=True)]),
    )


def evaluate_texts(
    model: Model,
    texts: Sequence[str],
    options: SamplingOptions,
    reader: Reader,
    *,
    seed: int = 0,
    subject: torch.Tensor | None = None,
) -> ReadingScore:
    """Draw one sample per text and let the reader read it."""
    return score_reading(draw(model, list(texts), options, seed=seed, subject=subject, title="reading"), texts, reader)
