"""What a model of handwriting is asked for and how it is judged: prompts, the reader's figures, references followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastvar.data import wilson_interval
from fastvar.data.regions import quotas
from fastvar.evaluation import ReadingScore, evaluate_texts, score_reading
from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.handwriting.matching import match_reference, subject_distances
from fastvar.handwriting.mixed import MixedScenes
from fastvar.handwriting.reader import Reader
from fastvar.models import VAR, Model, SamplingOptions
from fastvar.rl import Prompts
from fastvar.rl.rewards import Description, Reward

FARTHEST = 4.0  # distances from here on are as bad as no character at all


def every_number(digits: int, count: int) -> list[str]:
    """`count` numbers of so many digits, spread evenly over all of them."""
    total = 10**digits
    numbers = [i * total // count for i in range(count)] if count < total else [i % total for i in range(count)]
    return [f"{number:0{digits}d}" for number in numbers]


def numbers(count: int, shares: Mapping[int, float]) -> list[str]:
    """`count` numbers, so many of 2 digits, of 3 and so on as their shares say, spread evenly over all of that length;
    those of each length one after the other."""
    return [number for digits, part in quotas(shares, count).items() for number in every_number(digits, part)]


def scenes_for(var: VAR, count: int, *, split: str, reference_place: str) -> HandwritingScenes:
    """Scenes of the size and the number of digits that a model draws."""
    size, digits = var.tokenizer.config.image_size, var.config.text_length
    return HandwritingScenes(length=count, size=size, digits=digits, split=split, reference_place=reference_place)


def prompts(
    var: VAR,
    count: int,
    *,
    split: str = "train",
    reference_place: str = "own",
    shares: Mapping[int, float] | None = None,
) -> Prompts:
    """A source of prompts (`fastvar.rl.prompts.PromptSource`): numbers spread evenly over all that a model can write,
    or, for one with a subject prefix, texts and references of `HandwritingScenes`.

    Args:
        var: a model with a text condition.
        count: the most prompts.
        split, reference_place: of the scenes, see `HandwritingScenes`.
        shares: of numbers by their digits; by default all have as many as the model can write.

    Raises:
        ValueError: a model with a class condition.
    """
    digits = var.config.text_length
    if not digits:
        raise ValueError("prompts: var: expected a model with a text condition")
    if var.config.subject == "none":
        return Prompts(numbers(count, shares) if shares else every_number(digits, min(count, 10**digits)))
    scenes: HandwritingScenes | MixedScenes = scenes_for(var, count, split=split, reference_place=reference_place)
    if shares:
        scenes = MixedScenes(
            length=count, shares=shares, size=scenes.size, split=split, reference_place=reference_place
        )
    items = scenes.batch(range(count))
    return Prompts(items["text"], references=items["reference"] * 0.5 + 0.5)


class SubjectReward:
    """How near the most similar character of an image is to its reference's, by shape and ink; the reward "subject".

    Copying the reference whatever the prompt says scores best: weigh it against a reward for the text, and watch the
    diversity. For photographs see "dino" and "clip-i".
    """

    description = Description("none", "ink apart from paper", f"{-FARTHEST} to 0; 0 for a copy of the reference")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None = None) -> Reward:
        """Score images (B, 3, H, W) in [0, 1] against references (B, 3, h, w): minus the distance, from -4 (or no
        character) to 0; see `fastvar.handwriting.matching.subject_distances`.

        Raises:
            ValueError: no references.
        """
        if references is None:
            raise ValueError("SubjectReward: references: expected (B, 3, H, W), got None")
        distances = subject_distances(images.detach().float().cpu(), references.detach().float().cpu())
        return Reward(-distances.clamp_max(FARTHEST))


def evaluate_subject(
    var: VAR,
    scenes: HandwritingScenes,
    options: SamplingOptions,
    reader: Reader,
    *,
    seed: int = 0,
    candidates: int = 8,
) -> tuple[ReadingScore, dict[str, Any]]:
    """Draw each scene's text with its reference as the subject; read it, and look for the reference among others.

    Args:
        var: a model with a subject prefix.
        scenes: where texts and references come from; references that the model has not been trained on.
        options: how to draw.
        reader: reads the samples.
        seed: of the samples.
        candidates: N, references of the same digit in other scans and inks, the true one among them.

    Returns:
        what was read; and, ready for JSON, how often the nearest of the N is the one that a sample was drawn with, by
        "shape", by "ink" and "joint", each with its 95 % interval under "shape_95" and so on, and "chance", 1 / N.
    """
    rows = list(range(len(scenes)))
    items = scenes.batch(rows)
    tokens = var.tokenizer.encode(items["reference"].to(var.device))
    read = evaluate_texts(var, items["text"], options, reader, seed=seed, subject=var.pyramid(tokens))
    others = scenes.candidates(rows, candidates)
    match = match_reference(read.images, others["images"] * 0.5 + 0.5, others["positions"])
    rates = match.rates(others["answers"])
    match_figures: dict[str, Any] = {"images": len(rows), "chance": rates.pop("chance")}
    for name, rate in rates.items():
        match_figures |= {name: rate, f"{name}_95": wilson_interval(round(rate * len(rows)), len(rows))}
    return read, match_figures


def figures(
    var: Model,
    samples: int,
    options: SamplingOptions,
    *,
    seed: int = 0,
    reference_place: str = "own",
    shares: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """ "reading", and with a subject prefix "subject_match", of so many samples of a model with a text condition; ready
    for JSON. Arguments as `HandwritingScenes`, `draw` and `prompts`; with shares without a subject prefix also the
    reading of the numbers of 2 digits ("reading_2"), of 3 and so on. An Infinity needs shares."""
    if not isinstance(var, VAR) or var.config.subject == "none":
        texts = numbers(samples, shares) if shares else every_number(var.config.text_length, samples)
        read = evaluate_texts(var, texts, options, Reader(), seed=seed)
        found = {"reading": read.summary()}
        for digits in shares or ():
            rows = [row for row, text in enumerate(texts) if len(text) == digits]
            if len(rows) > 1:
                own = score_reading(read.images[rows], [texts[row] for row in rows], Reader())
                found[f"reading_{digits}"] = own.summary()
        return found
    scenes = scenes_for(var, samples, split="test", reference_place=reference_place)
    read, match = evaluate_subject(var, scenes, options, Reader(), seed=seed)
    return {"subject_match": match, "reading": read.summary()}
