"""Implementations by other packages: when they can run."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from fastvar.ops._dispatch import Implementation


def package_implementation(
    backend: str, op: str, package: str | None, dtypes: tuple[torch.dtype, ...], verified: tuple[str, ...] = ()
) -> Implementation:
    """The implementation `fastvar.kernels.<op>.impl_<backend>` for GPUs, on explicit request; see `Implementation`.

    Args:
        backend: its name.
        op: the operator.
        package: the one on the package index that it needs, or None for a part of PyTorch.
        dtypes: what it takes.
        verified: see `Implementation`.
    """
    # looked for once: dispatch must stay traceable
    installed = package is None or find_spec(backend) is not None

    def missing() -> str | None:
        return None if installed else f"{package} is not installed (pip install {package})"

    def obstacle(tensor: torch.Tensor) -> str | None:
        if tensor.dtype in dtypes:
            return None
        expected, given = " or ".join(_name(dtype) for dtype in dtypes), _name(tensor.dtype)
        return f"takes {expected}, the tensor is {given}"

    module = f"fastvar.kernels.{op}.impl_{backend}"
    return Implementation(backend, module, devices=("cuda",), missing=missing, obstacle=obstacle, verified=verified)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
