"""Record what a run of the demo found.

    make demo
    python -m benchmarks.demo --results outputs/demo/results.json --output benchmarks/data/demo.jsonl

The row has the run's own figures and seconds; device, versions and commit are those of this process, so it is to be run
on the same machine and checkout, right after the demo.
"""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from benchmarks import records


def main(results: Path, output: Path) -> None:
    """Append one record.

    Args:
        results: the demo's results.json.
        output: file of JSON lines to append to.
    """
    records.append(output, {"benchmark": "demo", **records.provenance(), **json.loads(results.read_text())})


if __name__ == "__main__":
    tyro.cli(main)
