"""Argument checks of the public operators: one clear sentence that names operator, argument, expected and got."""

from __future__ import annotations

import os

import torch

from fastvar.ranges import Range
from fastvar.schedule import ScaleSchedule

# Read once: checks of values wait for the device, which nobody wants unasked.
DEBUG = os.environ.get("FASTVAR_DEBUG") == "1"


def fail(op: str, argument: str, expected: str, got: object) -> None:
    """Raise the ValueError every operator raises for a user's mistake."""
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def kind(value: object) -> str:
    """What a value is, for a message: a tensor's dtype; an array of another library prints one as well, but is none."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def shape(op: str, argument: str, tensor: torch.Tensor, *expected: int | str | None) -> None:
    """Check a tensor's shape; a str or None stands for any size (a str names it in the message)."""
    if not isinstance(tensor, torch.Tensor):
        fail(op, argument, "a tensor", kind(tensor))
    got = tensor.shape
    if len(got) == len(expected):
        for size, want in zip(got, expected, strict=True):
            if want is not None and not isinstance(want, str) and size != want:
                break
        else:
            return
    names = ", ".join("*" if e is None else str(e) for e in expected)
    fail(op, argument, f"shape ({names})", tuple(got))


def same_shape(op: str, argument: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Check that a tensor has just this shape."""
    if not isinstance(tensor, torch.Tensor) or tensor.shape != expected:
        shape(op, argument, tensor, *expected)


def same_dtype_and_device(op: str, reference: str, tensor: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Check that the tensors named have the dtype and device of `tensor`, whose argument is called `reference`."""
    for name, other in others.items():
        if other is not None and (other.dtype != tensor.dtype or other.device != tensor.device):
            fail(op, name, f"{tensor.dtype} on {tensor.device} as {reference}", f"{kind(other)} on {other.device}")


def same_device(op: str, reference: str, tensor: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Check that the tensors named are on the device of `tensor`, whose argument is called `reference`."""
    device = tensor.device
    for name, other in others.items():
        if other is not None and other.device != device:
            fail(op, name, f"{device} as {reference}", other.device)


def floating(op: str, argument: str, tensor: torch.Tensor) -> None:
    """Check that a tensor holds floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        fail(op, argument, "a floating-point tensor", kind(tensor))


def finite(op: str, argument: str, tensor: torch.Tensor) -> None:
    """With FASTVAR_DEBUG=1, outside of torch.compile: check that a tensor holds neither infinities nor NaN."""
    if DEBUG and not torch.compiler.is_compiling() and not torch.isfinite(tensor).all():
        fail(op, argument, "finite numbers", f"{int((~torch.isfinite(tensor)).sum())} that are not")


def number(op: str, argument: str, value: float, allowed: Range) -> None:
    """Check that a number is in a range."""
    expected = allowed.problem(value)
    if expected is not None:
        fail(op, argument, expected, value)


def integer(op: str, argument: str, tensor: torch.Tensor) -> None:
    """Check that a tensor holds int64 or int32 indices."""
    if tensor.dtype not in (torch.int64, torch.int32):
        fail(op, argument, "int64 or int32", kind(tensor))


def writable(op: str, argument: str, tensor: torch.Tensor, **others: torch.Tensor) -> None:
    """Check, outside of torch.compile, that every element of a tensor has memory of its own, apart from the others'."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        fail(op, argument, "memory of its own for every element", f"strides {tensor.stride()}")
    if not torch.compiler.is_compiling():
        for name, other in others.items():
            if other.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                fail(op, name, f"memory apart from {argument}", "the same storage")


def indices(op: str, argument: str, tensor: torch.Tensor, size: int) -> None:
    """With FASTVAR_DEBUG=1, outside of torch.compile: check that indices are from 0 to size - 1."""
    if DEBUG and not torch.compiler.is_compiling() and tensor.numel():
        smallest, largest = (int(bound) for bound in tensor.aminmax())
        if smallest < 0 or largest >= size:
            fail(op, argument, f"indices from 0 to {size - 1}", f"{smallest} to {largest}")


def schedule(op: str, value: object) -> None:
    """Check that a schedule is a `ScaleSchedule`."""
    if not isinstance(value, ScaleSchedule):
        fail(op, "schedule", "a ScaleSchedule", type(value).__name__)


def groups(op: str, argument: str, batch: int, rows: int) -> None:
    """Check that `batch` rows can share `rows` rows evenly: row b reads row b // (batch // rows)."""
    if (rows == 0) != (batch == 0) or (rows and batch % rows):
        fail(op, argument, f"a number of rows that divides the batch {batch}", rows)
