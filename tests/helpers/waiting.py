"""A hook that sees what would make a program wait for its device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Copies to the host, constants from the host, and results whose shape depends on values.
WAITING = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
WAITING |= {"item", "is_nonzero"}  # inside of an op they are not taken apart
COUNTED = (torch.ops.aten.repeat_interleave.Tensor, torch.ops.aten.repeat_interleave.self_Tensor)
METHODS = ("tolist", "numpy", "cpu")  # they reach no operator where memory is the host's


class Waits:
    """Inside, `seen` gets the names of the operators and functions that would wait, had their tensors been on a GPU."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name in METHODS:
            self._stack.enter_context(patch.object(torch.Tensor, name, _recorded(name, self.seen)))
        self._stack.enter_context(_Operators(self.seen))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        chosen_by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        counted = func in COUNTED and not (kwargs or {}).get("output_size")
        if name in WAITING or chosen_by_mask or counted:
            self.seen.append(name)
        if func.namespace == "fastvar":  # look inside
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _recorded(name: str, seen: list[str]) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return method(tensor, *args, **kwargs)

    return call
