"""Files of weights, read without running code from them, and the names that wrappers give to weights."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
# What DistributedDataParallel and DataParallel, torch.compile, FSDP and activation checkpointing put into names. The
# first is also an ordinary name: it counts at the beginning alone.
_OUTER = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)*")
_INNER = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_weights(path: str | Path, owner: str, *, mapped: bool = False) -> Any:
    """What safetensors or torch.save wrote into a file, on the CPU. No code of the file is run.

    Args:
        path: the file; which of the two it is is read off its content.
        owner: "class: argument", as it opens messages.
        mapped: leave tensors in the file, mapped into memory, where its format allows that: to look at what there is.

    Raises:
        OSError: a file that cannot be read.
        ValueError: anything else than tensors in plain containers, a damaged file.
    """
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            start = file.read(9)
        mapped = mapped and start.startswith(b"PK")  # the format before torch 1.6 cannot be mapped
    except OSError as error:
        raise type(error)(f"{owner}: {error}") from error
    try:
        if start[8:] == b"{" or str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # each way of being something else raises another one
        raise ValueError(
            f"{owner}: expected a file of safetensors or torch.save, got {path}: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """Why a file could not be loaded: without torch's advice to load it with weights_only=False, which would run its
    code, and without the hundreds of lines that name each tensor which does not fit."""
    held = re.search(r"GLOBAL (\S+)", str(error))
    if held:
        return (
            f"it also holds a {held[1]}, whose code would have to be run; "
            "where it was written, save the state dict alone: torch.save(model.state_dict(), path)"
        )
    if "weights_only" in str(error):
        return "it is something else"
    return textwrap.shorten(str(error), 600) or type(error).__name__


def without_wrappers(state: Mapping[str, _T]) -> tuple[dict[str, _T], str]:
    """A state dict by the names that the model itself gives, and the prefix that all of them had.

    A model that was wrapped when it was saved has names such as "module._orig_mod.head.weight".
    """
    prefixes = {_OUTER.match(name)[0] for name in state}  # type: ignore[index]  # it matches the empty text
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    inner = {_INNER.sub("", name.removeprefix(prefix)): tensor for name, tensor in state.items()}
    return (inner, prefix) if len(inner) == len(state) else (dict(state), "")
