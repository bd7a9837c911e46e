"""The settings that a run's folder was begun with: it goes on only with the same, but it may go on longer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvar.files import read_json_object, write_json
from fastvar.training.checkpoints import ANEW
from fastvar.training.log import say

SEEDS = "sha256"  # how seeds follow from a run's own, see `fastvar.random.derive`; a run draws otherwise with others


class OtherSettingsError(ValueError):
    """A run's folder was begun with other settings."""


def check_same_settings(path: Path, settings: dict[str, Any], *, may_change: Sequence[str] = ()) -> None:
    """Raise an OtherSettingsError that names what differs from the settings that a run's folder was begun with, but for
    the names in `may_change`. What did not exist when it was begun may describe the data, or be nothing."""
    before = read_json_object(path, "train: output") if path.is_file() else {}
    different = []
    for part, now in settings.items():
        old = before.get(part, {} if isinstance(now, dict) else None)
        if isinstance(now, dict) and isinstance(old, dict):
            names = [
                name
                for name in {**old, **now}
                if name not in may_change
                and old.get(name) != now.get(name)
                and (name in old or (part != "data" and now[name] is not False and now[name] not in ([], {}, "")))
            ]
            different += [f"{part}.{name} was {old.get(name)}, is {now.get(name)}" for name in names]
        elif old != now:
            different.append(f"{part} was {old}, is {now}")
    if different:
        raise OtherSettingsError(
            f"train: output: {path.parent} has a run with other settings ({'; '.join(different)}); {ANEW}"
        )


def check_enough_steps(name: str, steps: int, done: int, output: Path) -> None:
    """Raise an OtherSettingsError where a run has gone further than it is asked to."""
    if steps < done:
        raise OtherSettingsError(
            f"train: {name}: expected at least {done}, which the run in {output} has done, got {steps}; {ANEW}"
        )


def write_settings(path: Path, settings: dict[str, Any], resumed_from: int | None, steps: int) -> None:
    """Write a run's settings, and under "lengths" for how many steps it was meant from which step on.

    Args:
        path: the file.
        settings: as JSON has them.
        resumed_from: the step that the run goes on from, or None for a new run.
        steps: how many there are to be in all.
    """
    lengths: list[dict[str, int]] = []
    if resumed_from is not None:
        lengths = read_json_object(path, "train: output").get("lengths", [])
        if lengths and lengths[-1]["steps"] != steps:
            say(f"{path.parent} goes on from step {resumed_from} to {steps} instead of {lengths[-1]['steps']}")
    if not lengths or lengths[-1]["steps"] != steps:
        lengths = [*lengths, {"from": resumed_from or 0, "steps": steps}]
    write_json(path, {**settings, "lengths": lengths})
