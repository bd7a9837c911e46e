"""The images of a benchmark from a model: those that are not there yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from PIL import Image

from fastvar.bars import progress_bar
from fastvar.data.pairs import read_references
from fastvar.evaluation import draw
from fastvar.files import json_text, read_json_object, write_json
from fastvar.image_benchmarks.items import Item
from fastvar.models import Model, SamplingOptions
from fastvar.pictures import save_picture, to_uint8
from fastvar.rl.measuring import fingerprint
from fastvar.rl.prompts import Prompts, subject_of
from fastvar.training.lock import locked

DRAWN = "drawn.json"  # how the images of a folder were drawn
_SPEED = ("batch_size", "decode_tile", "graphs")  # options that change no image, or hardly


def draw_items(model: Model, items: Sequence[Item], folder: Path, options: SamplingOptions, *, seed: int = 0) -> None:
    """Draw the images of items into a folder, NAME.png; files that are there are left as they are.

    An image depends on the model, the options, the seed and its place among the items, not on the batch. A model with
    a subject prefix gets the first photograph of an item's subject, as `read_references` makes it of the model's own
    size; others the prompt alone.

    Args:
        model: in evaluation mode, with its tokenizer and text encoder.
        items: what to draw.
        folder: of the images. It remembers how they were drawn.
        options: how to draw.
        seed: of the samples.

    Raises:
        ValueError: a folder of images that were drawn otherwise, a model that cannot draw the items.
    """
    conditions = _conditions(model, items)
    subjects = model.config.subject != "none"
    if subjects and not all(item.references for item in items):
        raise ValueError("benchmark: model: expected one without a subject prefix, as there are no photographs")
    size = options.batch_size
    with locked(folder):
        _check_drawn(model, items, folder, options, seed)
        for start in progress_bar(range(0, len(items), size), desc="drawing"):
            batch = items[start : start + size]
            paths = [folder / f"{item.name}.png" for item in batch]
            if all(path.is_file() for path in paths):
                continue
            subject = _subject(model, batch) if subjects else None
            images = draw(
                model, conditions[start : start + size], options, seed=seed, first_sample=start, subject=subject
            )
            for path, pixels in zip(paths, to_uint8(images), strict=True):
                save_picture(Image.fromarray(pixels), path)


def _conditions(model: Model, items: Sequence[Item]) -> Any:
    """What the model draws the items from: (n,) classes, or n texts."""
    prompts = [item.prompt for item in items]
    if model.config.text_length:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("benchmark: model: expected one of classes, got one of texts")
        return prompts
    try:
        return torch.tensor(
            [prompt if isinstance(prompt, int) else model.config.class_index(prompt) for prompt in prompts]
        )
    except ValueError as error:
        raise ValueError(f"benchmark: data: {error}") from None


def _subject(model: Model, items: Sequence[Item]) -> torch.Tensor | None:
    photographs = [item.references[0] for item in items]
    references = read_references(photographs, model.tokenizer.config.image_size, "benchmark: data") * 0.5 + 0.5
    return subject_of(model, Prompts([item.text for item in items], references=references))


def _check_drawn(model: Model, items: Sequence[Item], folder: Path, options: SamplingOptions, seed: int) -> None:
    """Raise a ValueError that names what the folder's images were drawn with otherwise; write it to a new folder."""
    settings = {
        "model": [fingerprint(model), fingerprint(model.tokenizer)],
        "config": asdict(model.config),
        "text_encoder": getattr(getattr(model, "text_encoder", None), "name", None),
        "items": crc32(
            json_text([(item.name, item.prompt, [*map(str, item.references[:1])]) for item in items]).encode()
        ),
        "seed": seed,
        **{name: value for name, value in asdict(options).items() if name not in _SPEED},
    }
    settings = json.loads(json_text(settings))  # as it is read again
    path = folder / DRAWN
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json_object(path, "benchmark: output")
    different = [name for name, value in settings.items() if before.get(name) != value]
    if different:
        raise ValueError(
            f"benchmark: output: expected another folder, as the images in {folder} were drawn with another "
            f"{', '.join(different)}"
        )
