"""Numbers of the host as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A few numbers, (n,). They travel as arguments of fills: a copy of host memory might wait for the device, and a
    CUDA graph would read that memory again. A graph makes the tensor anew, of the numbers it was captured with."""
    filled = [torch.full((), number, dtype=dtype, device=device) for number in numbers]
    return torch.stack(filled) if filled else torch.empty(0, dtype=dtype, device=device)
