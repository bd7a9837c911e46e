"""Human preference by category: prompts in a file for each, and the score of HPSv2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvar.files import read_text
from fastvar.image_benchmarks.figures import mean_figure, rows_by_group
from fastvar.image_benchmarks.items import Item, taken_prompts
from fastvar.image_benchmarks.scoring import Scores
from fastvar.rl.rewards.hps import HPSv2Reward


class HPSBenchmark:
    """100 times HPSv2, the mean over all images and over those of each category; intervals are over images.

    An image is CATEGORY/NNNNN.jpg, as in HPSv2's own benchmark, NNNNN the prompt from 00000; further images of it are
    CATEGORY/NNNNN_1.jpg and so on.

    Args:
        data: a folder of files of prompts whose names are the categories: .json, a list of texts (HPSv2's anime.json,
            concept-art.json, paintings.json and photo.json), or .txt, a prompt on each line.
        reward: what scores.
        per_prompt: images of each prompt; 1 as published, more tell of diversity.
        take: score so many prompts, evenly spread; 0 for all.

    Raises:
        ValueError: no prompts, or a file that holds something else.

    Source: HPSv2 (arXiv 2306.09341).
    """

    name = "hps"

    def __init__(self, data: Path, reward: HPSv2Reward, *, per_prompt: int = 1, take: int = 0) -> None:
        self.reward, self.per_prompt = reward, per_prompt
        self.items: Sequence[Item] = taken_prompts(read_categories(data, per_prompt), per_prompt, take)

    def describe(self) -> dict[str, Any]:
        """The weights."""
        return {"hpsv2": self.reward.description._asdict()}

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """100 times the reward (n,)."""
        return {"hpsv2": 100 * self.reward(images, [item.text for item in items]).scores}

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """All in all, and by category."""
        groups = rows_by_group(items)
        categories = {
            group: {"images": len(rows), **mean_figure("hpsv2", scores["hpsv2"][rows])}
            for group, rows in groups.items()
        }
        return {**mean_figure("hpsv2", scores["hpsv2"]), "categories": categories}


def read_categories(data: Path, per_prompt: int = 1) -> list[Item]:
    """All images of files of prompts, by category; errors as `HPSBenchmark`."""
    items = []
    for file in sorted(data.iterdir()) if data.is_dir() else ():
        if file.suffix not in (".json", ".txt"):
            continue
        text = read_text(file, "benchmark: data")
        prompts = (
            _listed(file, text) if file.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
        )
        for number, prompt in enumerate(prompts):
            names = [f"{file.stem}/{number:05d}{f'_{image}' if image else ''}" for image in range(per_prompt)]
            items += [Item(name, prompt, prompt, file.stem) for name in names]
    if not items:
        raise ValueError(f"benchmark: data: expected files of prompts (CATEGORY.json or .txt) in {data}, got none")
    return items


def _listed(file: Path, text: str) -> list[str]:
    try:
        prompts = json.loads(text)
    except ValueError as error:
        raise ValueError(f"benchmark: data: {file}: damaged file: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"benchmark: data: expected a list of texts, got something else in {file}")
    return prompts
