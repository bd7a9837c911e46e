"""Every load and store of an interpreted kernel must lie inside a tensor that the kernel was given.

The interpreter itself reads and writes wherever a pointer leads. What a kernel was given is seen where the interpreter
converts the arguments of a launch; what it accesses, where masked loads and stores are carried out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


class OutOfBounds(IndexError):
    """A lane that is not masked lies outside of all tensors."""


_SPANS: list[tuple[int, int]] = []  # of the tensors of the launches so far: first byte, one past the last


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    low, high = sum(min(0, r) for r in reach), sum(max(0, r) for r in reach)
    start, size = tensor.data_ptr(), tensor.element_size()
    return start + low * size, start + (high + 1) * size


def _check(pointers: Any, mask: Any, what: str) -> None:
    addresses = np.asarray(pointers.data).ravel().astype(np.int64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data)).ravel().astype(bool)]
    kind = pointers.dtype.scalar if hasattr(pointers.dtype, "scalar") else pointers.dtype
    size = max(1, kind.element_ty.primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for low, high in _SPANS:
        inside |= (addresses >= low) & (addresses + size <= high)
    if not inside.all():
        where = interpreter.interpreter_builder.grid_idx
        raise OutOfBounds(f"{what}: {int((~inside).sum())} of {addresses.size} lanes in program {where}")


def install() -> None:
    """From now on launches are checked."""
    convert, execute = interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def converting(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor) and argument.numel():
            _SPANS.append(_span(argument))
        return convert(argument)

    def executing(self: Any, *arguments: Any, **options: Any) -> Any:
        _SPANS.clear()
        return execute(self, *arguments, **options)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **named)

    def storing(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, "store")
        return store(self, pointers, values, mask, *rest)

    interpreter._implicit_cvt = converting
    interpreter.GridExecutor.__call__ = executing
    interpreter.InterpreterBuilder.create_masked_load = loading
    interpreter.InterpreterBuilder.create_masked_store = storing
