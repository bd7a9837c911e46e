"""Files that appear whole: written beside their place and renamed into it. Text and JSON that users give."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path`, a file or a folder, when the block ends without an error. After
    an error all is as before.

    Raises:
        OSError: it could not be written, as on a full disk; names the path, the reason and the free space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    _remove(temporary)
    if former.exists() and not path.exists():  # a program was ended between two renames
        os.replace(former, path)
    _remove(former)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # a folder cannot be renamed over another one
            os.replace(path, former)
        try:
            os.replace(temporary, path)
        except BaseException:
            if former.exists():
                os.replace(former, path)
            raise
        _remove(former)
    except BaseException as error:
        free = shutil.disk_usage(path.parent).free  # before what was written is removed
        _remove(temporary)
        if isinstance(error, OSError) or "I/O error" in str(error):  # the latter is how safetensors says it
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{path}: could not be written: {reason} ({free / 2**20:,.0f} MiB were free)") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON. NaN and infinities, which JSON has not, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as `write_text` and `json_text` do."""
    write_text(path, json_text(value, indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_text(path: Path, owner: str) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        owner: "class: argument", as it opens messages.

    Raises:
        OSError: a file that cannot be read.
        ValueError: another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: expected text in UTF-8, got {path} ({error.reason})") from error
    except OSError as error:
        raise type(error)(f"{owner}: {error}") from error


def read_json_object(path: Path, owner: str) -> dict[str, Any]:
    """A JSON file that holds an object; arguments and errors as `read_text`.

    Raises:
        ValueError: also a damaged file, or another value in it.
    """
    text = read_text(path, owner)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{owner}: {path}: damaged file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{owner}: {path}: damaged file: expected an object")
    return value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
