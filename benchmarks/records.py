"""Benchmark results as JSON lines: each with what it was measured on and by which command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, caches, driver, cores, threads, load, versions, commit, whether that was changed, command, date (UTC)."""
    return {
        "device": device_name(device),
        "caches": caches() if torch.device(device).type == "cpu" else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "driver": driver() if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "commit": commit(ROOT),
        "dirty": dirty(ROOT),
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device | str = "cpu") -> str:
    """The GPU's or the CPU's model."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache
def caches() -> str | None:
    """The first core's caches, as "L1 48K, L2 2048K, L3 307200K"; None where Linux does not tell."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    each = [{name: (folder / name).read_text().strip() for name in ("level", "type", "size")} for folder in folders]
    sizes = [f"L{cache['level']} {cache['size']}" for cache in each if cache["type"] != "Instruction"]
    return ", ".join(sizes) or None


@lru_cache
def driver() -> str | None:
    """The version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


@lru_cache
def commit(repository: Path) -> str | None:
    """The commit that is checked out; None outside a git checkout. For a copy of this project the environment variable
    FASTVAR_COMMIT names it."""
    if repository == ROOT and os.environ.get("FASTVAR_COMMIT"):
        return os.environ["FASTVAR_COMMIT"]
    if _git(repository, "rev-parse", "--show-toplevel") != str(repository.resolve()):
        return None
    return _git(repository, "rev-parse", "HEAD")


def dirty(repository: Path) -> bool | None:
    """Whether a checkout has changes or files that are not in its commit; None outside a git checkout, and for a copy
    whose commit FASTVAR_COMMIT names."""
    if repository == ROOT and os.environ.get("FASTVAR_COMMIT"):
        return None
    # benchmarks/data is left out: the results themselves do not change what is measured
    status = _git(repository, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/data")
    return None if status is None else bool(status)


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """The command line of this process; of absolute paths only the last part."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record as one line, of its own also where the last one was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(record).encode() + b"\n")


def read(path: Path, *, skip: bool = False) -> list[dict[str, Any]]:
    """All records of a file; with `skip` a line that is none, such as one that was cut off, is named on stderr and left
    out.

    Raises:
        ValueError: a line is no record, without `skip`.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            message = f"{path}:{number}: expected a record in JSON, got {line[:40]!r}"
            if not skip:
                raise ValueError(message) from error
            print(f"{message}: left out", file=sys.stderr)
    return found


class Spread(NamedTuple):
    """The median and the 20 % and 80 % quantiles; of fewer than ten values the least and the largest."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    if len(values) < 10:
        return Spread(median(values), min(values), max(values))
    tenths = quantiles(values, n=10, method="inclusive")
    return Spread(tenths[4], tenths[1], tenths[7])
