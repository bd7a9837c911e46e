"""Who else does it: packages and checkouts, as far as they are there, and what they need to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastvar
from benchmarks import records
from benchmarks.cases import OURS, Contender, Setting
from fastvar.ops._dispatch import REGISTRY, Implementation

BESIDE = records.ROOT / "benchmarks" / "checkouts"
# Environment variables that name checkouts of the public code, which may also lie in benchmarks/checkouts/.
CHECKOUTS = {
    "VAR": ("FASTVAR_BENCH_VAR", "models/vqvae.py"),
    "Infinity": ("FASTVAR_BENCH_INFINITY", "infinity/models/infinity.py"),
}


def rivals_of(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The contenders of a row that are not ours."""
    return {name: measured for name, measured in row["contenders"].items() if not name.startswith(OURS)}


def missing_package(name: str, device: torch.device, *, needs_gpu: bool = True) -> str | None:
    """Why a package cannot compete on a device, or None: "flash_attn", "xformers", "liger_kernel"."""
    if find_spec(name) is None:
        return f"{name} is not installed"
    try:
        module = import_module(name)
        if name == "flash_attn" and not hasattr(module, "flash_attn_func"):  # flash-attn-4 alone, a part of that name
            return f"{name} is not installed"
    except Exception as error:  # built for another torch, say
        return f"{name} does not import: {type(error).__name__}: {error}"[:200]
    return f"{name} needs a GPU" if needs_gpu and device.type != "cuda" else None


def checkout(name: str) -> Path | str:
    """The path of a checkout of FoundationVision/VAR or Infinity, or why there is none."""
    variable, file = CHECKOUTS[name]
    path = os.environ.get(variable) or str(BESIDE / name)
    if not os.environ.get(variable) and not (BESIDE / name).is_dir():
        return f"{variable} names no checkout of FoundationVision/{name}"
    if not (Path(path) / file).is_file():
        return f"{variable}: expected a checkout of FoundationVision/{name}, found no {file} in it"
    return Path(path).resolve()


def compiled(function: Callable[..., Any], setting: Setting) -> Contender:
    """torch.compile of a function, or why it is left out."""
    if setting["size"] == "tiny":
        return "left out at size tiny: compiling would take longer than all else"
    return torch.compile(function, dynamic=False)


@lru_cache
def versions() -> dict[str, str]:
    """The versions of the rivals that are installed, and the commits of the checkouts."""
    packages = {
        "flash_attn": "flash-attn",
        "xformers": "xformers",
        "liger_kernel": "liger-kernel",
        "cut_cross_entropy": "cut-cross-entropy",
    }
    installed = {}
    for module, name in packages.items():
        if find_spec(module):
            with suppress(PackageNotFoundError):
                installed[name] = version(name)
    for name in CHECKOUTS:
        path = checkout(name)
        if isinstance(path, Path):
            installed[f"FoundationVision/{name}"] = str(records.commit(path))
    return installed


def _backends(op: str) -> list[Implementation]:
    """All but those by other packages, which are rivals called as their authors mean them to be."""
    return [each for each in REGISTRY[op] if each.backend not in ("flex", "flash_attn", "xformers")]


def own_names(op: str) -> tuple[str, ...]:
    """The contenders of an operator of ours: what "auto" runs, and each backend by name if there are several."""
    each = _backends(op)
    return (OURS, *(f"{OURS} {implementation.backend}" for implementation in each)) if len(each) > 1 else (OURS,)


def own(op: str, lead: torch.Tensor, call: Callable[..., Any]) -> tuple[dict[str, Contender], str]:
    """Our contenders, or why one cannot run, and the backend that "auto" takes.

    Args:
        op: the operator.
        lead: its first tensor.
        call: calls it; takes the problem's inputs and `backend`.
    """
    chosen = fastvar.explain(op, lead).backend
    contenders: dict[str, Contender] = {OURS: partial(call, backend="auto")}
    for name, implementation in zip(own_names(op)[1:], _backends(op), strict=False):
        obstacle = implementation.why_not(lead)
        if implementation.backend == chosen:
            contenders[name] = "is what auto runs"
        elif obstacle is not None:
            contenders[name] = obstacle
        else:
            contenders[name] = partial(call, backend=implementation.backend)
    return contenders, chosen
