"""What a report was made with: versions, commit, hardware, command and date."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import fastvar

_ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, str]:
    """Each as a line of text; the commit only in a git checkout of fastvar."""
    facts = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts["hardware"] = _hardware()
    facts["versions"] = (
        f"fastvar {fastvar.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}"
    )
    commit = _commit()
    if commit:
        facts["commit"] = commit
    return facts


def _hardware() -> str:
    threads = f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {threads}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads}"


def _commit() -> str | None:
    """What is checked out, and whether it has changes; None where fastvar is installed or git is not."""
    if _git("rev-parse", "--show-toplevel") != str(_ROOT):
        return None
    return f"{_git('rev-parse', 'HEAD')}{' with changes' if _git('status', '--porcelain') else ''}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
