"""DreamBench: photographs of subjects, prompts for each, likeness to the subject and to the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvar.data.folder import images_below
from fastvar.files import read_text
from fastvar.image_benchmarks.figures import mean_figure, rows_by_group
from fastvar.image_benchmarks.items import Item, read_image, taken_prompts
from fastvar.image_benchmarks.scoring import Scores, describe_scorers
from fastvar.rl.rewards.clip import CLIPTextReward
from fastvar.rl.rewards.models import ReferenceReward

LIST = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes whose subjects have the prompts of live subjects
_SUBJECT = re.compile(r"^(\w+),(.+)$", re.MULTILINE)
_PROMPT = re.compile(r"^'(.*)'\.format\(", re.MULTILINE)


class DreamBench:
    """DINO, CLIP-I and CLIP-T: the mean over the images of a subject, then over subjects; intervals are over subjects.

    DINO and CLIP-I are the mean cosine of an image with all photographs of its subject; CLIP-T that with the prompt,
    in which the class stands for the subject. As published: ViT-S/16 of DINO and ViT-B/32 of CLIP.

    An image is SUBJECT/PP_S.png: PP the prompt, from 00 in the order of the list, and S the image of it, from 0.

    Args:
        data: the folder `dataset` of google/dreambooth: SUBJECT/*.jpg and prompts_and_classes.txt.
        dino, clip_image: what compares with photographs.
        clip_text: what compares with prompts.
        per_prompt: images of each prompt; 4 as published.
        take: score so many prompts, see `taken_prompts`; 0 for all.
        token: what stands before the class in a prompt to a model, such as "sks"; never in what CLIP-T reads.

    Raises:
        ValueError: another folder; names what is missing.

    Source: DreamBooth (arXiv 2208.12242).
    """

    name = "dreambench"

    def __init__(
        self,
        data: Path,
        dino: ReferenceReward,
        clip_image: ReferenceReward,
        clip_text: CLIPTextReward,
        *,
        per_prompt: int = 4,
        take: int = 0,
        token: str = "",
    ) -> None:
        self.likeness = {"dino": dino, "clip-i": clip_image}
        self.clip_text, self.per_prompt = clip_text, per_prompt
        self.items: Sequence[Item] = taken_prompts(read_dreambench(data, per_prompt, token), per_prompt, take)
        self._goals: dict[tuple[str, str], torch.Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """The weights."""
        return describe_scorers({**self.likeness, "clip-t": self.clip_text})

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """Cosines (n,)."""
        scores: Scores = {}
        for name, reward in self.likeness.items():
            goals = torch.stack([self._goal(name, reward, item, images.device) for item in items])
            scores[name] = (reward.embed(images) * goals).sum(1)
        scores["clip-t"] = self.clip_text(images, [item.text for item in items]).scores
        return scores

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """Means over subjects, and those of each subject."""
        subjects = {
            subject: {name: float(scores[name][rows].double().mean()) for name in (*self.likeness, "clip-t")}
            for subject, rows in rows_by_group(items).items()
        }
        figures: dict[str, Any] = {}
        for name in (*self.likeness, "clip-t"):
            figures |= mean_figure(name, [means[name] for means in subjects.values()])
        return {**figures, "subjects": subjects}

    def _goal(self, name: str, reward: ReferenceReward, item: Item, device: torch.device) -> torch.Tensor:
        """The mean of the unit features of a subject's photographs: a cosine with it is the mean of the cosines."""
        key = name, item.group
        if key not in self._goals:
            features = [reward.embed(read_image(file)[None].to(device)) for file in item.references]
            self._goals[key] = torch.cat(features).mean(0)
        return self._goals[key]


def read_dreambench(data: Path, per_prompt: int, token: str = "") -> list[Item]:
    """All images of DreamBench; arguments and errors as there."""
    text = read_text(data / LIST, "benchmark: data")
    classes, _, prompts = text.partition("Object Prompts")
    parts = [_PROMPT.findall(part) for part in prompts.partition("Live Subject Prompts")[::2]]
    subjects = [pair for pair in _SUBJECT.findall(classes) if pair[0] != "subject_name"]
    if not subjects or not all(parts):
        raise ValueError(
            f"benchmark: data: expected subjects, object and live subject prompts in {data / LIST}, got less"
        )
    items = []
    for subject, kind in subjects:
        photographs = tuple(images_below(data / subject))
        if not photographs:
            raise ValueError(f"benchmark: data: expected photographs of {subject} in {data / subject}, got none")
        for number, template in enumerate(parts[kind in LIVE]):
            asked, compared = (
                " ".join(template.replace("{0}", word).replace("{1}", kind).split()) for word in (token, "")
            )
            items += [
                Item(f"{subject}/{number:02d}_{image}", asked, compared, subject, photographs)
                for image in range(per_prompt)
            ]
    return items
