"""When an implementation in Triton can run, and where all of them are."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from fastvar.ops._dispatch import REGISTRY, Implementation

# Read once: dispatch must stay traceable.
_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_implementation(
    op: str,
    *,
    function: str = "",
    verified: tuple[str, ...] = (),
    saves: tuple[int, ...] = (),
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
    largest: int | None = None,
) -> Implementation:
    """The implementation `fastvar.kernels.<op>.impl_triton`; see `Implementation`. With TRITON_INTERPRET=1 it runs on a
    CPU too, slowly. Its functions are called after `function`, if that is given. The lead tensor has one of `dtypes`
    and at most `largest` elements along its last dimension."""
    return Implementation(
        "triton",
        f"fastvar.kernels.{op}.impl_triton:{function}",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        obstacle=partial(_obstacle, dtypes, largest),
        verified=verified,
        saves=saves,
    )


def triton_modules() -> list[ModuleType]:
    """The modules of all implementations in Triton, imported; none where Triton is not installed."""
    rows = (row for implementations in REGISTRY.values() for row in implementations if row.backend == "triton")
    names = dict.fromkeys(row.module.partition(":")[0] for row in rows) if _INSTALLED else ()
    return [import_module(name) for name in names]


def _obstacle(dtypes: tuple[torch.dtype, ...], largest: int | None, tensor: torch.Tensor) -> str | None:
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, tensor.dtype)]
        return f"takes {', '.join(names[:-2])} and {names[-2]}, the tensor is {names[-1]}"
    if largest is not None and tensor.shape[-1] > largest:
        return f"takes up to {largest} elements along the last dimension, the tensor has {tensor.shape[-1]}"
    return None
