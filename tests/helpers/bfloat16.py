"""bfloat16 in Triton's interpreter, which keeps its bits as integers: multiplied and rounded as a GPU does it.

Kernels load it, multiply matrices of it and convert it; any other arithmetic on it is refused here, as the interpreter
would do it on the bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def floats(handle: Any) -> Any:
    """Of bfloat16 its values in float32; others as they are."""
    if not is_bfloat16(handle):
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def rounded(handle: Any) -> Any:
    """To the nearest in bfloat16, ties to even."""
    values = torch.from_numpy(np.ascontiguousarray(handle.data, np.float32)).bfloat16()
    return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    cast, convert, dot, binary = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot, builder.binary_op

    def casting(self: Any, value: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16:
            return value if is_bfloat16(value) else rounded(value)
        return cast(self, floats(value), to)

    def converting(self: Any, value: Any, to: Any, rounding: Any) -> Any:
        if is_bfloat16(value) or to.scalar == tl.bfloat16:
            return casting(self, value, to)
        return convert(self, value, to, rounding)

    def multiplying(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, floats(a), floats(b), *rest)

    def computing(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if is_bfloat16(a) or is_bfloat16(b):
            raise TypeError("arithmetic on bfloat16: convert it to float32 first")
        return binary(self, a, b, operation)

    builder.cast_impl, builder.create_fp_to_fp = casting, converting
    builder.create_dot, builder.binary_op = multiplying, computing
