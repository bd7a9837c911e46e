"""A short table of rows, the largest losses first: `python -m benchmarks.summary --rows FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks.cases import OURS, setting_name
from benchmarks.records import read


def lines(rows: list[dict[str, Any]], most: int) -> list[str]:
    """A line for each row: how much of the fastest rival's time ours takes, the largest first; at most `most`."""
    found = []
    for row in rows:
        rivals = {name: ratio["median"] for name, ratio in row["ratios"].items()}
        ours = row["contenders"][OURS]
        name = min(rivals, key=lambda name: rivals[name]) if rivals else ""
        loss = 1 / rivals[name] if rivals else 0.0
        roofline = f"{100 * ours['roofline']:4.0f} %" if "roofline" in ours else "      "
        title = f"{row['suite']}, {setting_name(row['setting'])}, {row['pass']}"
        against = f"{loss:6.2f} of {name}" if rivals else "       no rival ran"
        found.append((-loss, f"{title:<72.72}{1e3 * ours['seconds']['median']:10.3f} ms {roofline} {against}"))
    found.sort()
    texts = [text for _, text in found]
    if len(texts) > most - 2:
        texts = [*texts[: most - 2], f"... and {len(texts) - most + 2} more rows in the file"]
    return [f"{'suite, setting, pass':<72}{'ours':>13} {'roof':>6}   ours / fastest rival", *texts]


def main(rows: Path, skip: int = 0, most: int = 40) -> int:
    """Print the table.

    Args:
        rows: a file that the benchmarks wrote.
        skip: rows at its beginning to leave out.
        most: lines.
    """
    found = read(rows)[skip:] if rows.is_file() else []
    if not found:
        print(f"summary: no rows in {rows}", file=sys.stderr)
        return 1
    print("\n".join(lines(found, most)))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
