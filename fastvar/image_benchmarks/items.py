"""What a benchmark consists of: images by name, what each should show, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastvar.data.folder import EXTENSIONS
from fastvar.pictures import read_picture
from fastvar.random import derive


class Item(NamedTuple):
    """One image of a benchmark.

    Attributes:
        name: of its file below the folder of images, without the ending.
        prompt: what a model is asked for: a text, or a class by name or index.
        text: what the image is compared with.
        group: what figures are grouped by: a subject, a number of regions, a category.
        references: photographs of the subject.
    """

    name: str
    prompt: str | int
    text: str = ""
    group: str = ""
    references: tuple[Path, ...] = ()


def taken_prompts(items: Sequence[Item], per_prompt: int, count: int) -> list[Item]:
    """The items of `count` prompts, of which each has `per_prompt` adjacent ones; of all for 0.

    One is taken of each of `count` equal parts, at random but always the same: at equal steps all subjects of a
    benchmark would have the same prompt.
    """
    prompts = len(items) // per_prompt
    if not count or count >= prompts:
        return list(items)
    ends = [i * prompts // count for i in range(count + 1)]
    chosen = [low + derive(0, "take", low) % (high - low) for low, high in pairwise(ends)]
    return [item for prompt in chosen for item in items[prompt * per_prompt : (prompt + 1) * per_prompt]]


def find_files(folder: Path, items: Sequence[Item]) -> list[Path]:
    """The file of each item below a folder: its name with any ending of a picture.

    Raises:
        ValueError: no such folder, files that are missing (how many, and the first), or two for one item.
    """
    if not folder.is_dir():
        raise ValueError(f"benchmark: images: expected a folder, got {folder}")
    present: dict[str, list[Path]] = {}
    for place in {(folder / item.name).parent for item in items}:
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in EXTENSIONS:
                present.setdefault(str(file.with_suffix("")), []).append(file)
    files = [present.get(str(folder / item.name), []) for item in items]
    missing = [item.name for item, found in zip(items, files, strict=True) if not found]
    if missing:
        got = f"{len(missing)} are missing, the first {missing[0]}.png"
        raise ValueError(f"benchmark: images: expected {len(items)} in {folder}, {got}")
    for found in files:
        if len(found) > 1:
            raise ValueError(f"benchmark: images: expected one file of a name, got {found[0]} and {found[1]}")
    return [found[0] for found in files]


def read_image(file: Path) -> torch.Tensor:
    """A picture as (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: a file that is no picture; names it.
    """
    return as_tensor(read_picture(file, "benchmark: images"))


def as_tensor(picture: Any) -> torch.Tensor:
    """A PIL RGB image as (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
