"""Implementations by PyTorch's own attention and by other packages: when they can run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from types import MappingProxyType
from typing import NamedTuple

import torch

from fastvar.ops._choices import generation
from fastvar.ops._dispatch import Implementation


class Package(NamedTuple):
    """A package by which an operator can be computed.

    Attributes:
        name: on the package index.
        module: the one of the operator that imports it.
        families: of GPUs that it is for; empty for all.
        refused: by family, head dimensions that it does not take there.
    """

    name: str
    module: str
    families: tuple[str, ...] = ()
    refused: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def package_implementation(
    backend: str,
    packages: tuple[Package, ...],
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
        packages: it needs one, and takes the first that is there and for a GPU; none for a part of PyTorch.
        dtypes: what it takes on a GPU.
        op: the operator.
        devices: see `Implementation`.
        head_dims: the largest head dimension that it takes on a GPU, all multiples of 8 up to it; None for any.
        ragged: see `Implementation`.
        verified, saves: see `Implementation`.
    """
    # looked for once: dispatch must stay traceable
    there = tuple(package for package in packages if installed(package.name))

    def taken(family: str) -> Package | None:
        for package in there:
            if not package.families or family in package.families:
                return package
        return None

    def missing() -> str | None:
        if there or not packages:
            return None
        return f"{packages[0].name} is not installed (pip install {packages[0].name})"

    def obstacle(tensor: torch.Tensor) -> str | None:
        if tensor.device.type != "cuda":
            return None
        width = tensor.shape[-1]
        if tensor.dtype not in dtypes:
            expected, given = " or ".join(_name(dtype) for dtype in dtypes), _name(tensor.dtype)
            return f"takes {expected}, the tensor is {given}"
        if head_dims is not None and (width % 8 or width > head_dims):
            return f"takes head dimensions that are multiples of 8 up to {head_dims}, the tensor's is {width}"
        family = generation(tensor.device)
        package = taken(family)
        if there and package is None:
            return f"{there[0].name} is not for such a GPU (pip install {packages[-1].name})"
        if package is not None and width in package.refused.get(family, ()):
            return f"{package.name} does not take head dimension {width} on such a GPU (backend='triton' does)"
        return None

    def broken(tensor: torch.Tensor) -> str | None:
        package = taken(generation(tensor.device))
        reason = None if package is None else failure(f"fastvar.kernels.{op}.{package.module}")
        if package is None or reason is None:
            return None
        return f"{package.name} does not import: {reason} (pip install {package.name} brings what it needs)"

    module = f"fastvar.kernels.{op}.impl_{backend}"
    return Implementation(
        backend,
        module,
        devices=devices,
        obstacle=obstacle,
        missing=missing,
        broken=broken,
        ragged=ragged,
        verified=verified,
        saves=saves,
    )


def installed(package: str) -> bool:
    """Whether a package of this name on the index is there: two share the module flash_attn."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def failure(module: str) -> str | None:
    """Why a module does not import, or None; tried once."""
    return _failure(module)


failure.__dict__["_dynamo_marked_constant"] = True  # tracing cannot follow an import


@cache
def _failure(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # whatever a package does, such as loading a library that is not there
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
