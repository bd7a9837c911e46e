"""Launches of kernels in Triton that take the host little time.

At every launch Triton looks at each argument to find the compiled kernel that is meant, which for the 40 arguments of a
large kernel takes the host longer than many a kernel runs. What it looks at hardly ever changes from call to call.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_INT32 = range(-(2**31), 2**31)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (float, bool, type(None))  # whose values make no difference
MOST = 1024  # launches that are remembered for arguments of the same types


class Kernel:
    """A kernel, launched as Triton's own are: `kernel[grid](*arguments, **constants)`, constants by name.

    A launch like an earlier one calls its compiled kernel. It is like it if tensors have the same dtypes and lie at
    multiples of 16 bytes where those did, and integers that kernels are specialised for and constants are the same.
    Launches with tensor descriptors are left to Triton: kernels that take them run for long.

    Attributes:
        function: what triton.jit made.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiles = isinstance(function, JITFunction)  # else it is interpreted
        self._alike: dict[tuple[type, ...], _Alike | None] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launch(grid, arguments, constants)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        alike = self._like(arguments) if self._compiles else None
        if alike is None:
            self.function[grid](*arguments, **constants)
            return
        device = driver.active.get_current_device()
        key = alike.key(device, arguments, constants)
        found = alike.known.get(key)
        if found is not None:
            compiled, values = found
            compiled[(*grid, 1, 1)](*arguments, *values, stream=driver.active.get_current_stream(device))
            return
        compiled = self.function[grid](*arguments, **constants)
        if len(alike.known) >= MOST:
            alike.known.clear()
        rest = self.function.params[len(arguments) :]
        alike.known[key] = compiled, tuple([constants[parameter.name] for parameter in rest])

    def _like(self, arguments: tuple[Any, ...]) -> _Alike | None:
        types = tuple(map(type, arguments))
        if types not in self._alike:
            self._alike[types] = _alike(types, self.function.params)
        return self._alike[types]


class _Alike:
    """Launches with arguments of the same types.

    Attributes:
        known: compiled kernels by what the choice of one depends on, with the values of the constants in their order.
    """

    def __init__(self, tensors: list[int], numbers: list[int], loose: list[int]) -> None:
        """The places of tensors, of integers that kernels are specialised for, and of other integers."""
        self._tensors, self._numbers, self._loose = _take(tensors), _take(numbers), _take(loose)
        self.known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def key(self, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        tensors = self._tensors(arguments)
        return (
            device,
            *self._numbers(arguments),
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() % 16 == 0 for tensor in tensors],
            *[number in _INT32 for number in self._loose(arguments)],
            *constants,
            *constants.values(),
        )


def _alike(types: tuple[type, ...], parameters: list[Any]) -> _Alike | None:
    """None if there is something among them of which it is not known here what it is specialised for."""
    tensors, numbers, loose = [], [], []
    for place, (each, parameter) in enumerate(zip(types, parameters, strict=False)):
        if parameter.is_constexpr:  # by place: its value would decide
            return None
        if each in _TENSORS:
            tensors.append(place)
        elif each is int:
            (loose if parameter.do_not_specialize else numbers).append(place)
        elif each not in _NUMBERS:
            return None
    return _Alike(tensors, numbers, loose)


def _take(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Always a tuple, which itemgetter gives of two and more."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda arguments: tuple([arguments[place] for place in places])


def kernel(function: Any = None, **options: Any) -> Any:
    """triton.jit with these options, for what is launched from the host."""
    if function is None:
        return lambda function: kernel(function, **options)
    return Kernel(triton.jit(function, **options))
