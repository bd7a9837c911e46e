"""Where commands write, looked at before anything is computed, and what they print."""

from __future__ import annotations

import os
from pathlib import Path


def output_file(option: str, path: Path, suffix: str = "") -> None:
    """Raise a ValueError unless a file with that ending can be written there."""
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {path}")
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{option}: expected a file whose name ends in {suffix}, got {path}")
    output_folder(option, path.parent)


def output_folder(option: str, path: Path) -> None:
    """Raise a ValueError unless there is a folder that can be written to, or one can be made."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {existing}")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option}: expected a folder that can be written to, got {existing}")


def say(text: str) -> None:
    """Print; of several processes that torchrun or accelerate started only the first."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
