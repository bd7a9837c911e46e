"""Counter-based random numbers for kernels in Triton, bit for bit those of fastvar/random.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(seed, stream, counter):
    """Uniform numbers in [0, 1), multiples of 2**-24 in float32, for int64 that broadcast to the counters' shape."""
    counter_low, counter_high = _words(counter)
    stream_low, stream_high = _words(tl.zeros_like(counter) + stream)
    word, _, _, _ = tl.philox(seed, counter_low, counter_high, stream_low, stream_high)
    return (word >> 8).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _words(number):
    """The low and the high 32 bits of an int64."""
    return (number & 0xFFFFFFFF).to(tl.uint32), ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
