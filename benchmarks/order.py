"""Where time is short: which passes come first, and which are there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from benchmarks import records
from benchmarks.cases import Setting, Suite

Case = tuple[Suite, Setting, str]

# The most important first: a suite and what its setting has. Then come the first settings of all other suites, their
# second ones, and so on.
ORDER: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("qk_norm_rope", {"model": "VAR-d16"}),
    ("generate", {"model": "VAR-d16", "batch": 1}),
    ("generate", {"model": "VAR-d16", "batch": 64}),
    ("subject_step", {"model": "VAR-d16"}),
    ("block_causal_attention", {"model": "VAR-d16"}),
    ("block_causal_attention", {"model": "Infinity-2B", "batch": 8}),
    ("policy_loss", {"case": "GRPO"}),
    ("vmr_grpo_step", {"model": "VAR-d16", "case": "coarse iteration"}),
    ("training_step", {"model": "VAR-d16"}),
    ("block_causal_attention", {"model": "VAR-d36-512"}),
    ("residual_quantize", {"batch": 64}),
    ("sample_tokens", {"tokens": 256}),
    ("token_log_probs", {"model": "VAR-d30"}),
    ("vmr_grpo_step", {"model": "VAR-d16"}),
)
TRIES = 2  # of a pass that gave no row: the first one may have been cut off, or it ends the process


def by_priority(cases: Iterable[Case]) -> list[Case]:
    """The cases in ORDER; passes of one setting stay together."""
    cases = list(cases)
    places: dict[str, list[str]] = {}
    for suite, setting, _ in cases:
        settings = places.setdefault(suite.name, [])
        if _text(setting) not in settings:
            settings.append(_text(setting))

    def rank(case: Case) -> int:
        suite, setting, _ = case
        for place, (name, asked) in enumerate(ORDER):
            if name == suite.name and asked.items() <= setting.items():
                return place
        return len(ORDER) + places[suite.name].index(_text(setting))

    return sorted(cases, key=rank)


def share(cases: Sequence[Case], part: int, parts: int) -> list[Case]:
    """The cases of every `parts`-th setting, from the `part`-th on (from 0)."""
    settings = list(dict.fromkeys((suite.name, _text(setting)) for suite, setting, _ in cases))
    wanted = set(settings[part::parts])
    return [case for case in cases if (case[0].name, _text(case[1])) in wanted]


def part_of(text: str) -> tuple[int, int] | None:
    """ "2/3" is (1, 3): the second of three parts.

    Raises:
        ValueError: another text.
    """
    if not text:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--warm: expected I/N with 1 <= I <= N, got {text}")
    return int(part) - 1, int(parts)


class Journal:
    """What was tried and what came of it, in files beside each other that are written at once.

    Args:
        rows: the file of rows.
        device: a device's name; results of other devices do not count.
        compiling: nothing is measured, once is enough, and what was tried is remembered where this machine's compiled
            kernels are, in the folder for temporary files, rather than beside the rows.
    """

    def __init__(self, rows: Path, device: str, compiling: bool = False) -> None:
        here = Path(gettempdir()) / "fastvar_compiled.jsonl"
        self.rows, self.tries = rows, here if compiling else rows.with_suffix(".tries.jsonl")
        self._most = 1 if compiling else TRIES
        self._here = {"device": device, "commit": records.commit(records.ROOT), "sources": sources()}

    def open(self, cases: Iterable[Case]) -> list[Case]:
        """The cases that have no row of this device and of these sources, but those that were tried in vain."""
        done = {_key(row["suite"], row["setting"], row["pass"]) for row in self._own(self.rows)}
        tried = [_key(r["suite"], r["setting"], r["pass"]) for r in self._own(self.tries) if r["error"] is None]
        keys = [(case, _key(case[0].name, case[1], case[2])) for case in cases]
        return [case for case, key in keys if key not in done and tried.count(key) < self._most]

    def start(self, suite: str, setting: Setting, pass_: str) -> None:
        """A pass begins."""
        self._write(suite, setting, pass_, None)

    def fail(self, suite: str, setting: Setting, pass_: str, error: str) -> None:
        """A pass raised."""
        self._write(suite, setting, pass_, error)

    def _write(self, suite: str, setting: Setting, pass_: str, error: str | None) -> None:
        attempt = {"suite": suite, "setting": dict(setting), "pass": pass_, "error": error}
        records.append(self.tries, {**attempt, **self._here})

    def _own(self, path: Path) -> list[dict[str, Any]]:
        attempts = records.read(path, skip=True) if path.is_file() else []
        return [row for row in attempts if all(row.get(name) == value for name, value in self._here.items())]


@lru_cache
def sources() -> str:
    """A hash of all code that a row depends on, which a commit alone does not tell of a changed tree."""
    digest = hashlib.sha256()
    for folder in ("fastvar", "kernels", "csrc", "benchmarks"):
        for path in sorted((records.ROOT / folder).rglob("*")):
            place = path.relative_to(records.ROOT)
            if path.suffix in (".py", ".h", ".cpp", ".cu") and place.parts[1] not in ("checkouts", "wheels"):
                digest.update(f"{place.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _key(suite: str, setting: Setting, pass_: str) -> str:
    return json.dumps([suite, _text(setting), pass_])


def _text(setting: Setting) -> str:
    return json.dumps(dict(setting), sort_keys=True)
