"""Implementations in C++ and CUDA: when they can run. The libraries are loaded when one is first looked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastvar.ops._dispatch import Implementation, forget_answers

_DEVICES = {"cpu": "cpu", "cuda": "cuda"}  # backend and target of the build: device type


class _Library:
    """One of the two libraries. `missing` says why there is none, `error` why one that is there is not taken; `path` is
    the one that was loaded."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.looked = False
        self.missing: str | None = None
        self.error: str | None = None
        self.path: Path | None = None

    def look(self) -> _Library:
        if not self.looked:
            from fastvar import build

            paths = build.libraries(self.target)
            remedy = f"fastvar build --{self.target}"
            self.missing = None if paths else f"the {self.target} extension is not built ({remedy})"
            self.error = None
            for any_processor in paths:
                path = build.for_processor(any_processor, torch.backends.cpu.get_cpu_capability())
                try:
                    if build.is_current(path, self.target):
                        torch.ops.load_library(path)
                        self.path, self.error = path, None
                        break
                    self.error = f"{path} was built from other sources than these ({remedy})"
                except Exception as error:  # whatever it is, it is shown and not raised
                    reason = error.__cause__ or error  # torch hides the loader's own words behind others
                    self.error = f"{path} failed to load ({remedy} makes a new one): {reason}"
            self.looked = True
        return self


_LIBRARIES = {target: _Library(target) for target in _DEVICES}


def look_again() -> None:
    """After a build: libraries that were not there may be now. One that is loaded stays as it is."""
    for library in _LIBRARIES.values():
        library.looked = library.looked and library.missing is None and library.error is None
    forget_answers()


def _constant(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Tracing takes the answer as a constant: it cannot follow the loading of a library."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_constant
def missing(target: str) -> str | None:
    """Why there is no library of this target ("cpu" or "cuda"), with the remedy, or None if there is one."""
    return _LIBRARIES[target].look().missing


def load_error(target: str) -> str | None:
    """Why the library of this target was not taken, or None if it was, or is not there."""
    return _LIBRARIES[target].look().error


def loaded_from(target: str) -> Path | None:
    """The library of this target, or None if there is none, or none that could be taken."""
    return _LIBRARIES[target].look().path


@_constant
def _lack(target: str, op: str) -> str | None:
    """Why an op of a library cannot be called, or None if it can."""
    library = _LIBRARIES[target].look()
    if library.missing or library.error:
        return library.missing or library.error
    if not hasattr(getattr(torch.ops, f"fastvar_{target}"), op):
        return f"the {target} extension has no {op} (fastvar build --{target})"
    return None


def extension_implementation(
    backend: str,
    module: str,
    *,
    op: str,
    obstacle: Callable[[torch.Tensor], str | None] | None = None,
    verified: tuple[str, ...] = (),
) -> Implementation:
    """An implementation over the extension; see `Implementation`.

    Args:
        backend: "cpu" or "cuda".
        module: such as "fastvar.kernels.propagate_mask.impl_cpp".
        op: the name that it calls in the namespace fastvar_cpu or fastvar_cuda.
        obstacle: what else can stand in the way, once the extension is there. float64 always does: it computes in
            float32.
        verified: as in `Implementation`.
    """
    return Implementation(
        backend,
        module,
        devices=(_DEVICES[backend],),
        obstacle=partial(_obstacle, backend, op, obstacle),
        missing=partial(missing, backend),
        verified=verified,
    )


def _obstacle(
    target: str, op: str, more: Callable[[torch.Tensor], str | None] | None, tensor: torch.Tensor
) -> str | None:
    lack = _lack(target, op)
    if lack is not None:
        return lack
    if tensor.dtype == torch.float64:
        return "computes in float32, the tensor is float64"
    return more(tensor) if more is not None else None
