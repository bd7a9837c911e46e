"""Implementations by PyTorch's own attention and by other packages: when they can run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import torch

from fastvar.ops._dispatch import Implementation


def package_implementation(
    backend: str,
    packages: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    op: str,
    devices: tuple[str, ...] = ("cuda",),
    head_dims: int | None = None,
    ragged: bool = True,
    verified: tuple[str, ...] = (),
    saves: tuple[int, ...] = (),
) -> Implementation:
    """The implementation `fastvar.kernels.<op>.impl_<backend>`, on explicit request; see `Implementation`.

    Args:
        backend: its name.
        packages: those on the package index of which it needs one, none for a part of PyTorch.
        dtypes: what it takes on a GPU.
        op: the operator.
        devices: see `Implementation`.
        head_dims: the largest head dimension that it takes on a GPU, all multiples of 8 up to it; None for any.
        ragged: see `Implementation`.
        verified, saves: see `Implementation`.
    """
    # looked for once: dispatch must stay traceable
    is_installed = not packages or any(installed(package) for package in packages)

    def missing() -> str | None:
        return None if is_installed else f"{packages[0]} is not installed (pip install {packages[0]})"

    def obstacle(tensor: torch.Tensor) -> str | None:
        if tensor.device.type != "cuda":
            return None
        if tensor.dtype not in dtypes:
            expected, given = " or ".join(_name(dtype) for dtype in dtypes), _name(tensor.dtype)
            return f"takes {expected}, the tensor is {given}"
        if head_dims is not None and (tensor.shape[-1] % 8 or tensor.shape[-1] > head_dims):
            return (
                f"takes head dimensions that are multiples of 8 up to {head_dims}, the tensor's is {tensor.shape[-1]}"
            )
        return None

    module = f"fastvar.kernels.{op}.impl_{backend}"
    return Implementation(backend, module, devices, obstacle, missing, ragged, verified, saves)


def installed(package: str) -> bool:
    """Whether a package of this name on the index is there: two share the module flash_attn."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
