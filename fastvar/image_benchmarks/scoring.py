"""The one way that all benchmarks go: files, scores of each on disk, figures in one JSON, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from fastvar.bars import progress_bar
from fastvar.data import diversity
from fastvar.files import json_text, replacing, write_json, write_text
from fastvar.image_benchmarks.figures import mean_figure
from fastvar.image_benchmarks.grid import picture_grid
from fastvar.image_benchmarks.items import Item, find_files, read_image
from fastvar.pictures import save_picture
from fastvar.provenance import provenance
from fastvar.rl.rewards.base import Description, description_of, plain_options
from fastvar.training.lock import locked

PART = 32  # images of a file of scores: what an interrupted run scores again

Scores = dict[str, Any]  # by name (n,) or (n, d) float32, or n texts


class Benchmark(Protocol):
    """What is scored, how, and which figures are made of it.

    Attributes:
        name: of the benchmark.
        items: the images.
        per_prompt: how many images each prompt has, adjacent in `items`.
    """

    name: str
    items: Sequence[Item]
    per_prompt: int

    def describe(self) -> dict[str, Any]:
        """By what is scored, with all options, ready for JSON: scores that were made otherwise are made again."""

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """Scores of images (n, 3, H, W) in [0, 1] of n items."""

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """The figures of all scores, ready for JSON, each with its 95 % interval under NAME_95."""


def describe_scorers(scorers: Mapping[str, Any]) -> dict[str, Any]:
    """By name the description of each reward or reader and its plain options, ready for JSON."""
    return {
        name: {
            **description_of(scorer, Description(type(scorer).__name__))._asdict(),
            "options": plain_options(scorer),
        }
        for name, scorer in scorers.items()
    }


def run_benchmark(
    benchmark: Benchmark, images: Path, output: Path, *, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Score the images of a folder, or those that are not scored yet, and write what was found.

    Args:
        benchmark: which.
        images: the folder; the items' names say which files are read.
        output: gets `scores/` (by which a run goes on), `items.jsonl` (the scores of each image), `summary.json` and
            `grid.png`.
        device: where images are scored.

    Returns:
        what `summary.json` has.

    Raises:
        ValueError: images that are missing or no pictures.
    """
    items, output = benchmark.items, Path(output)
    files = find_files(images, items)
    with locked(output):
        scores = score_files(benchmark, items, files, output / "scores", device=device)
        figures = benchmark.summarise(items, scores)
        if benchmark.per_prompt > 1:
            figures |= mean_figure("diversity", scores["diversity"][:: benchmark.per_prompt])
        summary = {
            "benchmark": benchmark.name,
            "images": len(items),
            "folder": str(images),
            "figures": figures,
            "scored_by": benchmark.describe(),
            "made_with": provenance(),
        }
        write_text(output / "items.jsonl", "".join(f"{json_text(line)}\n" for line in _lines(items, scores)))
        save_picture(picture_grid(items, files), output / "grid.png")
        write_json(output / "summary.json", summary)
    return json.loads(json_text(summary))


def score_files(
    benchmark: Benchmark,
    items: Sequence[Item],
    files: Sequence[Path],
    folder: Path,
    *,
    device: str | torch.device = "cpu",
) -> Scores:
    """The scores of items with a file each. They are kept in a folder, a file for some tens of images; what is there of
    the same files by the same scorer is not computed again."""
    size = benchmark.per_prompt * max(1, PART // benchmark.per_prompt)
    parts = []
    for start in progress_bar(range(0, len(items), size), desc=benchmark.name):
        rows = slice(start, start + size)
        path = folder / f"{start:08d}.safetensors"
        of = _identity(benchmark, items[rows], files[rows])
        part = _read(path, of)
        if part is None:
            part = _score(benchmark, items[rows], files[rows], device)
            _write(path, of, part)
        parts.append(part)
    return _joined(parts)


def _identity(benchmark: Benchmark, items: Sequence[Item], files: Sequence[Path]) -> str:
    """What scores depend on: the benchmark, its scorers, texts, and files by their size and time of change."""
    stats = [file.stat() for file in files]
    of = [
        (item.name, item.text, [str(path) for path in item.references], stat.st_size, stat.st_mtime_ns)
        for item, stat in zip(items, stats, strict=True)
    ]
    return json_text([benchmark.name, benchmark.describe(), benchmark.per_prompt, of])


def _score(benchmark: Benchmark, items: Sequence[Item], files: Sequence[Path], device: str | torch.device) -> Scores:
    images = [read_image(file) for file in files]
    parts = []
    for _, run in groupby(range(len(items)), key=lambda row: images[row].shape):  # a batch has one size
        rows = list(run)
        batch = torch.stack([images[row] for row in rows])
        part = benchmark.score(batch.to(device), [items[row] for row in rows])
        if benchmark.per_prompt > 1:
            spread = torch.tensor(diversity(batch, benchmark.per_prompt))
            part["diversity"] = spread.repeat_interleave(benchmark.per_prompt)
        parts.append(part)
    return _joined(parts)


def _joined(parts: Sequence[Scores]) -> Scores:
    return {
        name: torch.cat([part[name].float().cpu() for part in parts])
        if isinstance(first, torch.Tensor)
        else [text for part in parts for text in part[name]]
        for name, first in parts[0].items()
    }


def _write(path: Path, of: str, part: Scores) -> None:
    from safetensors.torch import save_file

    tensors = {name: value for name, value in part.items() if isinstance(value, torch.Tensor)}
    texts = {name: value for name, value in part.items() if name not in tensors}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"of": of, "texts": json.dumps(texts)})


def _read(path: Path, of: str) -> Scores | None:
    """What was written, if it is of the same."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("of") != of:
                return None
            return {name: file.get_tensor(name) for name in file.keys()} | json.loads(about["texts"])  # noqa: SIM118
    except SafetensorError:  # damaged
        return None


def _lines(items: Sequence[Item], scores: Scores) -> list[dict[str, Any]]:
    """Each item with its scores, but for vectors."""
    single = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in scores.items()
        if not isinstance(value, torch.Tensor) or value.dim() == 1
    }
    return [
        {
            "name": item.name,
            "group": item.group,
            "text": item.text,
            **{name: value[i] for name, value in single.items()},
        }
        for i, item in enumerate(items)
    ]
