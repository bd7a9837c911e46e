"""GenEval: whether the objects that a prompt names are in its image, how many, of which colour and where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvar.files import read_text
from fastvar.image_benchmarks.detection import Detector, Found, Objects
from fastvar.image_benchmarks.figures import mean_figure, rows_by_group
from fastvar.image_benchmarks.items import Item, taken_prompts
from fastvar.image_benchmarks.scoring import Scores, describe_scorers
from fastvar.rl.rewards.clip import CLIPTextReward

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
SURE, SURE_OF_COUNTS = 0.3, 0.9  # scores above which an object is there
MOST = 16  # of a label
SLACK = 0.1  # of two objects' sides, by which their centres have to differ at least
GREY = 0x99 / 255  # what is around an object whose colour is asked for


class GenEval:
    """The share of right images, by task (one object, two, counting, colours, position, colours of two) and the mean
    over tasks; intervals are over prompts, of the overall figure with the tasks as strata.

    An image is NNNNN/samples/SSSS.png: NNNNN the prompt's line, SSSS the image of it, both from 0; the layout that the
    published evaluation describes.

    Args:
        data: the published evaluation_metadata.jsonl.
        detector: what finds objects; published figures are those of a Mask2Former (Swin-S) of mmdetection.
        clip: whose network tells colours; published figures are those of OpenAI's ViT-L/14.
        per_prompt: images of each prompt; 4 as published.
        take: score so many prompts, see `taken_prompts`; 0 for all.

    Raises:
        ValueError: another file; an object that the detector does not find.

    Source: GenEval (arXiv 2310.11513).
    """

    name = "geneval"

    def __init__(
        self, data: Path, detector: Detector, clip: CLIPTextReward, *, per_prompt: int = 4, take: int = 0
    ) -> None:
        self.detector, self.clip, self.per_prompt = detector, clip, per_prompt
        self.items: Sequence[Item] = taken_prompts(items_of(data, detector.labels, per_prompt), per_prompt, take)

    def describe(self) -> dict[str, Any]:
        """Which detector and which weights."""
        return describe_scorers({"detector": self.detector, "clip": self.clip})

    def score(self, images: Tensor, items: Sequence[Item]) -> Scores:
        """Whether each image is right, and what is wrong with it."""
        wrong = []
        for image, item in zip(images, items, strict=True):
            wanted = json.loads(item.text)
            least = SURE_OF_COUNTS if wanted["tag"] == "counting" else SURE
            objects = {
                label: kept
                for label, each in self.detector(image[None])[0].items()
                if (kept := [one for one in each if one.score > least][:MOST])
            }

            def colours(label: str, found: Sequence[Found], image: Tensor = image) -> list[str]:
                return [self.colour(image, label, one) for one in found]

            wrong.append(fault(wanted, objects, colours))
        return {"correct": torch.tensor([not text for text in wrong], dtype=torch.float64), "wrong": wrong}

    def colour(self, image: Tensor, label: str, found: Found) -> str:
        """The colour of an object in an image (3, H, W), whose surroundings are made grey, by CLIP."""
        mask = torch.ones(image.shape[-2:], dtype=torch.bool) if found.mask is None else found.mask
        seen = torch.where(mask.to(image.device), image, torch.full_like(image, GREY))
        left, top, right, bottom = map(round, found.box)
        crop = seen[:, max(top, 0) : bottom, max(left, 0) : right]
        texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]

        def nearest(crops: Tensor) -> Tensor:
            means = self.clip.clip.texts(texts, crops.device).view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            return self.clip.clip.images(crops) @ torch.nn.functional.normalize(means, dim=-1).T

        return COLOURS[int(self.clip.frozen(nearest, crop[None]).argmax())]

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """Of each task, and all in all."""
        right = scores["correct"].double()
        tasks = {}
        for task, rows in rows_by_group(items).items():
            prompts = right[rows].view(-1, self.per_prompt)
            tasks[task] = {
                "images": len(rows),
                **mean_figure("correct", prompts.mean(1)),
                **mean_figure("correct_prompts", prompts.amax(1)),
            }
        overall, intervals = (
            [task["correct"] for task in tasks.values()],
            [task["correct_95"] for task in tasks.values()],
        )
        mean, interval = sum(overall) / len(overall), None
        if all(intervals):
            half = math.hypot(*((high - low) / 2 for low, high in intervals)) / len(intervals)
            interval = max(mean - half, 0.0), min(mean + half, 1.0)
        return {"images": len(items), "overall": mean, "overall_95": interval, "tasks": tasks}


def fault(wanted: Mapping[str, Any], objects: Objects, colours: Callable[[str, Sequence[Found]], list[str]]) -> str:
    """What is wrong with an image; "" for nothing.

    The surest objects of a label are looked at, as many as are asked for: all of them have to have the colour, and to
    be where they should be beside all that an earlier part asks for. What is excluded must not be there so often.

    Args:
        wanted: a line of the published file.
        objects: what was found, by label, the surest first.
        colours: of objects of a label.
    """
    faults: list[str] = []
    right: list[Sequence[Found]] = []  # what each part found; nothing where it is wrong
    for part in wanted.get("include", ()):
        label, count = part["class"], part["count"]
        found = objects.get(label, [])[:count]
        problem = "" if len(found) == count else f"expected {count} {label}, found {len(found)}"
        if not problem and "color" in part:
            seen = colours(label, found)
            if seen.count(part["color"]) < count:
                problem = f"expected {part['color']} {label}, found {', '.join(seen)}"
        if not problem and "position" in part:
            relation, other = part["position"]
            if not right[other]:
                problem = f"nothing for {label} to be {relation}"
            elif any(relation not in relations(one, beside) for one in found for beside in right[other]):
                problem = f"expected {label} {relation}"
        right.append([] if problem else found)
        faults += [problem] if problem else []
    for part in wanted.get("exclude", ()):
        if len(objects.get(part["class"], [])) >= part["count"]:
            faults.append(f"expected fewer than {part['count']} {part['class']}")
    return "; ".join(faults)


def relations(one: Found, other: Found) -> set[str]:
    """Where an object is beside another: out of left of, right of, above, below, at most one of each direction.

    The centres' difference in each direction counts as far as it is more than a tenth of both sides together, and has
    to be more than half of the centres' distance.
    """
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        sides = one.box[high] - one.box[low] + other.box[high] - other.box[low]
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - SLACK * sides, 0.0), offset))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    across, down = (value / math.hypot(*offsets) for value in beyond)
    names = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, value in names.items() if value > 0.5}


def items_of(data: Path, labels: Sequence[str], per_prompt: int = 4) -> list[Item]:
    """All images of GenEval; what an image should have is its item's text. Errors as there."""
    items = []
    for number, line in enumerate(read_text(data, "benchmark: data").splitlines()):
        try:
            wanted = json.loads(line)
            prompt, task = wanted["prompt"], wanted["tag"]
            names = [part["class"] for part in (*wanted["include"], *wanted.get("exclude", ()))]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"benchmark: data: expected lines of evaluation_metadata.jsonl, got {line[:60]!r} in {data}"
            ) from error
        unknown = sorted(set(names) - set(labels))
        if unknown:
            raise ValueError(f"benchmark: data: expected objects that the detector finds, got {unknown} in {data}")
        items += [Item(f"{number:05d}/samples/{image:04d}", prompt, line.strip(), task) for image in range(per_prompt)]
    if not items:
        raise ValueError(f"benchmark: data: expected lines of evaluation_metadata.jsonl, got none in {data}")
    return items
