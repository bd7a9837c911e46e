"""A short table of rows, the largest losses first: `python -m benchmarks.summary --rows FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, setting_name
from benchmarks.records import read
from benchmarks.rivals import rivals_of


def lines(rows: list[dict[str, Any]], most: int) -> list[str]:
    """For each device a table of the rows of its newest commit, the newest row of each pass: how much of the fastest
    rival's time ours takes, the largest first, in at most `most` lines."""
    printed = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        commit = own[-1]["commit"]
        newest = {str([row["suite"], row["setting"], row["pass"]]): row for row in own if row["commit"] == commit}
        printed += [f"{device}, commit {(commit or 'unknown')[:7]}:", *_table(list(newest.values()), most)]
    return printed


def _table(rows: list[dict[str, Any]], most: int) -> list[str]:
    ranked = []
    for row in rows:
        rivals = {name: row["ratios"][name]["median"] for name in rivals_of(row)}
        ours = row["contenders"][OURS]
        name = min(rivals, key=lambda name: rivals[name]) if rivals else ""
        loss = 1 / rivals[name] if rivals else 0.0
        roofline = f"{100 * ours['roofline']:4.0f} %" if "roofline" in ours else "      "
        title = f"{row['suite']}, {setting_name(row['setting'])}"
        against = f"{loss:6.2f} of {name}" if rivals else "       no rival ran"
        seconds = 1e3 * ours["seconds"]["median"]
        ranked.append((-loss, f"{title:<70.70} {row['pass']:<8} {seconds:10.3f} ms {roofline} {against}"))
    ranked.sort()
    texts = [text for _, text in ranked]
    if len(texts) > most - 1:
        texts = [*texts[: most - 2], f"... and {len(texts) - most + 2} more rows in the file"]
    return [f"{'suite, setting':<70} {'pass':<8} {'ours':>13} {'roof':>6}   ours / fastest rival", *texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a file that the benchmarks wrote")
    parser.add_argument("--most", type=int, default=40, help="lines for a device")
    arguments = parser.parse_args()
    rows = read(arguments.rows, skip=True) if arguments.rows.is_file() else []
    if not rows:
        print(f"summary: no rows in {arguments.rows}", file=sys.stderr)
        return 1
    print("\n".join(lines(rows, arguments.most)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
