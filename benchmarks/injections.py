"""The ways in which a subject is injected, on equal budgets: the demo's VAR fine-tuned with each of them.

    make demo
    python -m benchmarks.injections --model outputs/demo/var

A record for each run in benchmarks/data/injections.jsonl: how often samples of held-out texts and references are read
exactly, and how often the nearest of eight references is the one that a sample was drawn with. Runs that are there are
not run again. Without a model it writes the table of what is there into docs/ablations.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import torch
import tyro

from benchmarks import records
from benchmarks.report import between
from fastvar.evaluation import GUIDED
from fastvar.handwriting import HandwritingScenes, Reader
from fastvar.handwriting.demo import DemoConfig, train_config
from fastvar.handwriting.evaluation import evaluate_subject
from fastvar.models import VAR
from fastvar.models.injection import SUBJECTS
from fastvar.random import derive
from fastvar.rl.ablation import student_interval
from fastvar.training import TokenDataset, VARTask, train

ROWS = records.ROOT / "benchmarks" / "data" / "injections.jsonl"
PAGE = records.ROOT / "docs" / "ablations.md"
FIGURES = {"word_accuracy": "read exactly", "shape": "shape", "ink": "ink", "joint": "both"}


def main(
    model: Path | None = None,
    rows: Path = ROWS,
    steps: int = 120,
    scenes: int = 4000,
    seeds: int = 3,
    samples: int = 200,
) -> None:
    """Run what is missing, or write the table.

    Args:
        model: folder of the VAR to start from; None for the table.
        rows: file of JSON lines.
        steps: of each run, of the demo's batches.
        scenes: to train on.
        seeds: of the first of them all kinds are run before the next one's.
        samples: images that each run is judged by.
    """
    if model is None:
        PAGE.write_text(between(PAGE.read_text(), "injections", table(records.read(rows))))
        return
    start, reader = VAR.from_pretrained(model), Reader()
    settings: dict[str, Any] = {
        "size": start.tokenizer.config.image_size,
        "digits": start.config.text_length,
        "reference_place": "scene",
    }
    tokens = TokenDataset(HandwritingScenes(length=scenes, **settings), start.tokenizer, reference=True)
    done = [_key(row) for row in records.read(rows, skip=True)] if rows.is_file() else []
    for seed in range(seeds):
        held_out = HandwritingScenes(length=samples, split="test", seed=seed, **settings)
        for own_tokens in (False, True):
            for subject in SUBJECTS[1:]:
                if (subject, own_tokens, seed) not in done:
                    row = run(start, subject, own_tokens, tokens, held_out, reader, steps=steps, seed=seed)
                    records.append(rows, row)
                    shown = ("subject", "own_tokens", "seed", "seconds", *FIGURES)
                    print({name: row[name] for name in shown}, flush=True)


def run(
    start: VAR,
    subject: str,
    own_tokens: bool,
    tokens: TokenDataset,
    held_out: HandwritingScenes,
    reader: Reader,
    *,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Fine-tune a model with a kind of subject, and judge its averaged weights."""
    torch.manual_seed(derive(seed, "weights"))
    task = VARTask(start.add_subject(subject, own_tokens=own_tokens))
    options = train_config(DemoConfig(seed=seed, precision="no"), steps)
    with TemporaryDirectory() as folder:
        trained = train(task, tokens, options, Path(folder))
    read, match = evaluate_subject(trained.model, held_out, GUIDED, reader, seed=seed)
    return {
        "benchmark": "injections",
        **records.provenance(),
        "subject": subject,
        "own_tokens": own_tokens,
        "seed": seed,
        "seconds": round(trained.seconds, 1),
        **{name: value for name, value in read.summary().items() if name != "images"},
        **match,
        "start": crc32(start.head.weight.detach().numpy().tobytes()),
        "train": asdict(options),
        "sampling": asdict(GUIDED),
        "model": asdict(trained.model.config),
    }


def _key(row: Mapping[str, Any]) -> tuple[str, bool, int]:
    return row["subject"], row["own_tokens"], row["seed"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each kind of subject: per cent read and matched, means over seeds with 95 % intervals (Student's t; of
    a single seed that of its images)."""
    head = ["subject", "its tokens", *FIGURES.values(), "seeds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for subject, own_tokens in dict.fromkeys(_key(row)[:2] for row in rows):
        runs = [row for row in rows if _key(row)[:2] == (subject, own_tokens)]
        cells = [f"`{subject}`", "own" if own_tokens else "complete"]
        for name in FIGURES:
            values = [row[name] for row in runs]
            low, high = student_interval(values) if len(runs) > 1 else runs[0][f"{name}_95"]
            cells.append(f"{100 * fmean(values):.1f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(_line([*cells, str(len(runs))]))
    return "".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    tyro.cli(main)
