"""What stands for fastvar/ops/_extension.py in a folder of Triton's kernels: C++ and CUDA are named and not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastvar.ops._dispatch import Implementation


def _missing(backend: str) -> str:
    return f"the {backend} extension is no part of this folder (an installation of fastvar has it)"


def extension_implementation(
    backend: str,
    module: str,
    *,
    op: str,
    obstacle: Callable[[torch.Tensor], str | None] | None = None,
    verified: tuple[str, ...] = (),
) -> Implementation:
    """An implementation that never runs; arguments as in fastvar itself."""
    return Implementation(backend, module, devices=(backend,), missing=partial(_missing, backend))
