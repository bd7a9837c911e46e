"""What a run reports: a JSON line per logged step, TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from tqdm import tqdm

from fastvar.bars import progress_bar
from fastvar.files import json_text, write_json, write_text
from fastvar.provenance import provenance


class RunLog:
    """Writes metrics of the main process to `metrics.jsonl` and TensorBoard and shows them on a progress bar, on a
    terminal or in a notebook; also to Weights & Biases, if it is installed and the environment variable WANDB_PROJECT
    names a project.

    What a run was begun with (command, commit, machine) goes to `provenance.json`.

    A metric that is not finite is null in the file. Each line also has the run's seconds so far. On resuming, lines of
    steps after `first_step` are dropped, as they will be written again, and the seconds go on from the last line that
    is kept.

    Args:
        output: the run's folder.
        first_step, last_step: the steps that the progress bar counts.
        title: of the progress bar.
        shown: names of the metrics on the progress bar; None for all.
        active: False for all processes but the main one: nothing is written or shown.
    """

    def __init__(
        self,
        output: Path,
        first_step: int,
        last_step: int,
        *,
        title: str,
        shown: Sequence[str] | None = None,
        active: bool = True,
    ) -> None:
        self.path = output / "metrics.jsonl"
        self.active, self.shown = active, shown
        self._board: Any = None
        self._wandb: Any = None
        self._bar = progress_bar(total=last_step, initial=first_step, desc=title, active=active)
        if not active:
            return
        if first_step == 0:
            write_json(output / "provenance.json", provenance())
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step]
        write_text(self.path, "".join(json_text(line) + "\n" for line in kept))
        self._start = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        self._file = self.path.open("a")
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        if os.environ.get("WANDB_PROJECT"):
            with suppress(ImportError):
                import wandb

                identity = output / "wandb.txt"  # an interrupted run goes on in the same record
                if first_step == 0 or not identity.is_file():
                    write_text(identity, token_hex(8))
                self._wandb = wandb.init(id=identity.read_text(), name=output.name, resume="allow")

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        if not self.active:
            return
        line = {"step": step, **metrics, "seconds": round(time.perf_counter() - self._start, 3)}
        self._file.write(json_text(line) + "\n")
        self._file.flush()
        shown = {n: v for n, v in metrics.items() if self.shown is None or n in self.shown}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def picture(self, step: int, name: str, image: Any) -> None:
        """Show a PIL image on TensorBoard."""
        if self.active and self._board is not None:
            import numpy as np

            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._bar.close()
        if self.active:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def say(text: str) -> None:
    """A line to the user on standard error, above the progress bars."""
    tqdm.write(f"fastvar: {text}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, NaN for null; a line cut off by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                line = json.loads(text)
                lines.append({name: math.nan if value is None else value for name, value in line.items()})
    return lines
