"""Pictures on disk and small data sets of benchmarks made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from fastvar.pictures import to_uint8

SUBJECTS = {"bowl2": "bowl", "cat": "cat"}
OBJECT = ["a {0} {1} on the moon", "a red {0} {1}"]
LIVE = ["a {0} {1} in a hat", "a wet {0} {1}"]


def smooth_images(count: int, height: int = 24, width: int = 20, seed: int = 0) -> torch.Tensor:
    """(count, 3, height, width) in [0, 1] on the 256 levels of a file, away from both ends."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def save_images(folder: Path, names: Iterable[str], images: torch.Tensor, ending: str = ".png") -> None:
    """Each image as a file of its name."""
    for name, pixels in zip(names, to_uint8(images), strict=True):
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def make_dreambench(folder: Path, photographs: int = 2) -> Path:
    """Two subjects, two prompts each, photographs of several sizes, in dreambooth's layout."""
    calls = {"Object": OBJECT, "Live Subject": LIVE}
    listed = {
        kind: "".join(f"'{prompt}'.format(unique_token, class_token),\n" for prompt in prompts)
        for kind, prompts in calls.items()
    }
    prompts = "\n".join(f"{kind} Prompts\n\nprompt_list = [\n{text}]\n" for kind, text in listed.items())
    subjects = "".join(f"{name},{kind}\n" for name, kind in SUBJECTS.items())
    folder.mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{subjects}\nPrompts\n\n{prompts}")
    for number, subject in enumerate(SUBJECTS):
        for photograph in range(photographs):
            image = smooth_images(1, 30 + 4 * photograph, 36, seed=100 + 10 * number + photograph)
            save_images(folder, [f"{subject}/0{photograph}"], image, ".jpg")
    return folder


def make_cvtg(folder: Path, prompts: dict[str, list[str]]) -> Path:
    """CVTG-2K's layout: "CVTG/2" to its prompts, with indices from 0."""
    for name, texts in prompts.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"index": index, "prompt": text, "sentence_list": []} for index, text in enumerate(texts)]
        path.write_text(json.dumps({"data_list": entries}))
    return folder
