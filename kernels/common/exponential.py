"""The exponential of kernels that take one of every number they read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """Two instructions for exp(x) where tl.exp takes five; what is below the least normal number is 0."""
    return tl.exp2(x * 1.4426950408889634)
