"""What a machine can do at most: the rates that rooflines are made of, measured rather than taken from a data sheet."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import interleave


class Peaks(NamedTuple):
    """Measured rates.

    Attributes:
        flops: multiplications and additions a second of a large matrix product or convolution, whichever is faster;
            in float32 on a GPU with TF32 where PyTorch uses it by default.
        bandwidth: bytes a second, read and written, of a large copy.
    """

    flops: float
    bandwidth: float


@lru_cache
def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The peaks of a device for a floating dtype, measured once per process, at the process's number of threads."""
    gpu = device.type == "cuda"
    side, length = (8192, 2**30) if gpu else (2048, 2**27)
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(length, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    channels, size = (1024, 64) if gpu else (256, 32)
    image = torch.randn(8, channels, size, size, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    calls = {
        "matmul": lambda: torch.mm(a, a),
        "convolution": lambda: F.conv2d(image, weight, padding=1),  # on some CPUs another library's kernel
        "copy": lambda: target.copy_(source),
    }
    seconds, _ = interleave(calls, device, 2.0, rounds=(5, 20))
    counted = {"matmul": 2.0 * side**3, "convolution": 18.0 * image.numel() * channels}
    flops = max(count / min(seconds[name]) for name, count in counted.items() if name in seconds)
    return Peaks(flops, 2 * length / min(seconds["copy"]))


def roofline(flops: float, bytes_: float, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that this many operations and bytes take at least; 0 where neither was counted."""
    if not flops and not bytes_:
        return 0.0
    rates = peaks(device, dtype)
    return max(flops / rates.flops, bytes_ / rates.bandwidth)
