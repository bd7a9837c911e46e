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
from fastvar.models import VAR
from fastvar.ranges import Count, CountOrNone, Guidance, Seed, Share, Temperature, check_fields

Interval = tuple[float, float]


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn; see `fastvar.models.sampling.generate`."""

    guidance: Guidance = 2.0
    """Classifier-free guidance of the last scale; it grows linearly from 0 at the first one."""
    temperature: Temperature = 1.0
    """Divides the logits; below 1 the likeliest codes gain."""
    top_k: CountOrNone = 0
    """Keep this many codes; 0 for all."""
    top_p: Share = 0.9
    """Keep the likeliest codes of this mass; 1 for all."""
    seed: Seed = 0
    """Of the samples."""
    batch_size: Count = 64
    """Images drawn at a time; it changes nothing but memory and speed."""
    graphs: bool = True
    """Draw by CUDA graphs where they can be used: on a GPU."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense."""
        check_fields(self)


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


def _check_room(var: VAR, rows: int, guided: bool) -> None:
    """Raise a ValueError where the keys and values alone, which a batch keeps, are more than the memory there is."""
    parameter, config = next(var.parameters()), var.config
    row = 2 * config.depth * var.schedule.num_tokens * config.embed_dim * parameter.element_size() * (1 + guided)
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
    var: VAR, labels: Any, options: SamplingOptions, *, subject: torch.Tensor | None = None, title: str = "sampling"
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] for N labels, drawn in batches.

    Args:
        var: the model, in evaluation mode.
        labels: N class indices or texts.
        options: how.
        subject: (N, L, C) pyramids of reference subjects, or None.
        title: of the progress bar.
    """
    options.check()
    if not len(labels):
        raise ValueError("draw: labels: expected at least one, got none")
    labels = var.indices(labels)  # all of them, before the first is drawn
    _check_room(var, min(len(labels), options.batch_size), options.guidance != 0)
    images = []
    for start in progress_bar(range(0, len(labels), options.batch_size), desc=title, leave=False):
        rows = slice(start, start + options.batch_size)
        out = var.generate(
            labels[rows],
            subject=None if subject is None else subject[rows],
            guidance=options.guidance,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            first_sample=start,
            graphs=None if options.graphs else False,
        )
        assert out.images is not None  # they were decoded
        images.append(out.images.cpu())
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
    var: VAR, texts: Sequence[str], options: SamplingOptions, reader: Reader, *, subject: torch.Tensor | None = None
) -> ReadingScore:
    """Draw one sample per text and let the reader read it."""
    return score_reading(draw(var, list(texts), options, subject=subject, title="reading"), texts, reader)
