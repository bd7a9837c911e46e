"""When an implementation in Triton can run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from fastvar.ops._dispatch import Implementation

# Read once: dispatch must stay traceable.
_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_implementation(op: str, *, auto: bool = False, verified: tuple[str, ...] = ()) -> Implementation:
    """The implementation `fastvar.kernels.<op>.impl_triton`; see `Implementation`. With TRITON_INTERPRET=1 it runs on a
    CPU too, slowly."""
    return Implementation(
        "triton",
        f"fastvar.kernels.{op}.impl_triton",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        obstacle=_obstacle,
        auto=auto,
        verified=verified,
    )


def _obstacle(tensor: torch.Tensor) -> str | None:
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if tensor.dtype not in _DTYPES:
        return f"takes float32, float16 and bfloat16, the tensor is {str(tensor.dtype).removeprefix('torch.')}"
    return None
