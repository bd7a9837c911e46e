"""What a machine can do at most: the rates that rooflines are made of, measured rather than taken from a data sheet."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from benchmarks.measure import interleave


class Peaks(NamedTuple):
    """Measured rates.

    Attributes:
        flops: multiplications and additions a second of a large matrix product.
        bandwidth: bytes a second, read and written, of a large copy.
    """

    flops: float
    bandwidth: float


@lru_cache
def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Of a device, for a floating dtype; measured once a process, at the process's number of threads."""
    gpu = device.type == "cuda"
    side, length = (8192, 2**30) if gpu else (2048, 2**27)
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(length, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, a), "copy": lambda: target.copy_(source)}
    seconds = interleave(calls, device, 2.0, rounds=(5, 20))
    return Peaks(2 * side**3 / min(seconds["matmul"]), 2 * length / min(seconds["copy"]))


def roofline(flops: float, bytes_: float, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that this many operations and bytes take at least; 0 where neither was counted."""
    if not flops and not bytes_:
        return 0.0
    found = peaks(device, dtype)
    return max(flops / found.flops, bytes_ / found.bandwidth)
