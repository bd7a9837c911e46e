"""How well the reader reads handwriting scenes, and how fast both are.

    python -m benchmarks.handwriting --output benchmarks/data/handwriting.jsonl

One record per kind of scene: word accuracy with its 95 % interval and NED, seconds to render and to read; and one for
the matching of references, on the scenes themselves and on unrelated ones.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torchvision.transforms.functional import gaussian_blur

from benchmarks import records
from fastvar.evaluation import score_reading
from fastvar.handwriting import HandwritingScenes, Reader, match_reference

# name: settings of the scenes, and the blur's sigma in pixels
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "test, 2 digits, 32x32": ({}, 0.0),
    "train, 2 digits, 32x32": ({"split": "train"}, 0.0),
    "test, 2 digits, 24x32": ({"size": (24, 32)}, 0.0),
    "test, 3 digits, 32x32": ({"digits": 3}, 0.0),
    "test, 3 digits, 64x64": ({"digits": 3, "size": (64, 64)}, 0.0),
    "test, 6 digits, 32x128": ({"digits": 6, "size": (32, 128)}, 0.0),
    "test, 2 digits, 32x32, blur 0.6": ({}, 0.6),
    "test, 2 digits, 32x32, blur 0.8": ({}, 0.8),
    "test, 2 digits, 32x32, blur 1.0": ({}, 1.0),
}


def main(output: Path, scenes: int = 5000, candidates: int = 8) -> None:
    """Measure and append one record per kind of scene.

    Args:
        output: file of JSON lines to append to.
        scenes: of each kind.
        candidates: references to tell apart.
    """
    reader = Reader()
    reader(torch.rand(1, 3, 32, 32))  # fits it, outside the times
    for name, (settings, sigma) in KINDS.items():
        data = HandwritingScenes(**{"length": scenes, "split": "test", **settings})
        start = time.perf_counter()
        batch = data.batch(range(scenes))
        rendered = time.perf_counter()
        images = batch["image"] * 0.5 + 0.5
        if sigma:
            images = gaussian_blur(images, [7, 7], [sigma, sigma])
        before = time.perf_counter()
        score = score_reading(images, batch["text"], reader)
        read = time.perf_counter()
        record = {
            "benchmark": "handwriting reader",
            **records.provenance(),
            "kind": name,
            **score.summary(),
            "render_us_per_scene": round((rendered - start) / scenes * 1e6, 1),
            "read_us_per_scene": round((read - before) / scenes * 1e6, 1),
        }
        records.append(output, record)
        print(f"{name:34}{score.accuracy:8.4f} {score.accuracy_interval}  NED {score.similarity:.4f}")

    data = HandwritingScenes(length=min(scenes, 2000), split="test")
    rows = range(len(data))
    images, others = data.batch(rows)["image"] * 0.5 + 0.5, data.candidates(rows, candidates)
    for name, shown in {"the scenes": images, "unrelated scenes": images.roll(1, 0)}.items():
        match = match_reference(shown, others["images"] * 0.5 + 0.5, others["positions"])
        rates = match.rates(others["answers"])
        records.append(
            output, {"benchmark": "reference match", **records.provenance(), "kind": name, "images": len(data), **rates}
        )
        print(name, rates)


if __name__ == "__main__":
    tyro.cli(main)
