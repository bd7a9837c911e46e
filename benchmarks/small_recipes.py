"""What the small recipes found, before and after. Right after a run, in the same checkout,

    python -m benchmarks.small_recipes outputs/recipes/vmr_grpo/table.json

records it, known by the folder's name, and writes the newest run of each recipe into docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks import records, report
from benchmarks.recipes import DOCUMENT
from benchmarks.scaling import table
from fastvar.files import read_json_object, write_text

ROWS = records.ROOT / "benchmarks" / "data" / "recipes.jsonl"
FIGURES = {
    "reading.word_accuracy": "read exactly",
    "reading.ned": "NED",
    "rewards.ocr": "OCR reward",
    "rewards.colour": "redness",
    "rewards.subject": "likeness to the subject",
    "subject_match.shape": "own reference nearest of eight, by shape",
    "subject_match.ink": "by ink",
    "subject_match.joint": "by both",
    "rewards.jpeg": "minus kilobytes of a JPEG, not trained",
    "rewards.diversity": "diversity",
}


def row(path: Path) -> dict[str, Any]:
    """Of a recipe's table.json."""
    return {
        "benchmark": "small recipe",
        "recipe": path.resolve().parent.name,
        **records.provenance(),
        **read_json_object(path, "small_recipes: path"),
    }


def newest(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By recipe."""
    return {row["recipe"]: row for row in rows}


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, found in newest(rows).items():
        for figure, label in FIGURES.items():
            if figure in found["figures"]:
                columns = found["figures"][figure]
                yield f"`{name}`", label, *(_cell(figure, columns[column]) for column in ("before", "after"))


def _cell(figure: str, found: Mapping[str, Any]) -> str:
    rate = figure.startswith("subject_match") or figure.endswith("accuracy")
    value, low, high = (f"{100 * x:.1f}" if rate else f"{x:.3f}" for x in (found["value"], *found["interval_95"]))
    return f"{value}{' %' if rate else ''} ({low} to {high})"


def runs(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, found in newest(rows).items():
        seconds = ", ".join(f"{step} {value:.0f}" for step, value in found["seconds"].items())
        made = found["provenance"]
        yield f"`{name}`", seconds, made["commit"][:7], made["date"][:10], made["hardware"]


def with_tables(text: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A text with the tables put between their markers."""
    rows = list(rows)
    text = report.between(text, "small", table(["recipe", "figure", "before", "after"], lines(rows)))
    return report.between(text, "runs", table(["recipe", "seconds of its steps", "commit", "date", "on"], runs(rows)))


def main(tables: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Record tables, and write the document.

    Args:
        tables: table.json of recipes, each in a folder of the recipe's name.
    """
    for path in tables:
        records.append(ROWS, row(path))
    write_text(DOCUMENT, with_tables(DOCUMENT.read_text(), records.read(ROWS)))


if __name__ == "__main__":
    tyro.cli(main)
