"""Prompts by category, a file of them for each, scored by rewards; HPSv2's own benchmark is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvar.files import read_text
from fastvar.image_benchmarks.figures import mean_figure, rows_by_group
from fastvar.image_benchmarks.items import Item, taken_prompts
from fastvar.image_benchmarks.scoring import Scores, describe_scorers
from fastvar.rl.rewards.base import RewardSum
from fastvar.rl.rewards.hps import HPSv2Reward


class PromptBenchmark:
    """Any rewards of images and prompts: means over the images of each prompt, then over all prompts and those of each
    category; intervals are over prompts.

    An image is CATEGORY/NNNNN.png, NNNNN the prompt from 00000; further images of it are CATEGORY/NNNNN_1.png, ...

    Args:
        data: a folder of files of prompts whose names are the categories: .json, a list of texts, or .txt, a prompt on
            each line; for a model of classes lines CLASS TAB PROMPT, a class by name or index and what its image should
            show.
        reward: what scores; weights play no part. Those that are held out are scored too, as "held_out/NAME".
        per_prompt: images of each prompt; more than one tell of diversity.
        take: score so many prompts, see `taken_prompts`; 0 for all.

    Raises:
        ValueError: no prompts, or a file that holds something else.
    """

    name = "prompts"

    def __init__(self, data: Path, reward: RewardSum, *, per_prompt: int = 1, take: int = 0) -> None:
        self.reward, self.per_prompt = reward, per_prompt
        self.items: Sequence[Item] = taken_prompts(read_categories(data, per_prompt), per_prompt, take)

    def describe(self) -> dict[str, Any]:
        """What each reward is."""
        return describe_scorers({**self.reward.rewards, **self.reward.held_out})

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """Each reward's scores (n,)."""
        return dict(self.reward.ask(images, [item.text for item in items], held_out=True)[0])

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """All in all, and by category."""

        def of(rows: Sequence[int]) -> dict[str, Any]:
            figures: dict[str, Any] = {"images": len(rows)}
            for name in (*self.reward.rewards, *self.reward.held_out):
                prompts = scores[name][rows].view(-1, self.per_prompt).nanmean(1)
                figures |= mean_figure(f"held_out/{name}" if name in self.reward.held_out else name, prompts)
            return figures

        categories = {group: of(rows) for group, rows in rows_by_group(items).items()}
        return {**of(range(len(items))), "categories": categories}


class HPSBenchmark(PromptBenchmark):
    """100 times HPSv2, otherwise as `PromptBenchmark`. HPSv2's own prompts are its anime.json, concept-art.json,
    paintings.json and photo.json, and its own layout has CATEGORY/NNNNN.jpg, one of each prompt.

    Args:
        reward: what scores.

    Source: HPSv2 (arXiv 2306.09341).
    """

    name = "hps"

    def __init__(self, data: Path, reward: HPSv2Reward, *, per_prompt: int = 1, take: int = 0) -> None:
        super().__init__(data, RewardSum({"hpsv2": reward}), per_prompt=per_prompt, take=take)

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        return {name: 100 * scores for name, scores in super().score(images, items).items()}


def read_categories(data: Path, per_prompt: int = 1) -> list[Item]:
    """All images of files of prompts, by category; errors as `PromptBenchmark`."""
    items = []
    for file in sorted(data.iterdir()) if data.is_dir() else ():
        if file.suffix not in (".json", ".txt"):
            continue
        text = read_text(file, "benchmark: data")
        if file.suffix == ".json":
            prompts = [("", prompt) for prompt in _listed(file, text)]
        else:
            prompts = [line.rpartition("\t")[::2] for line in text.split("\n") if line.strip()]
        for number, (label, prompt) in enumerate(prompts):
            names = [f"{file.stem}/{number:05d}{f'_{image}' if image else ''}" for image in range(per_prompt)]
            items += [Item(name, label or prompt, prompt, file.stem) for name in names]
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
