"""What a trainer measures besides its rewards: seconds, memory, the loss's parts, which weights it began with."""

from __future__ import annotations

import resource
import time
from zlib import crc32

import torch
from torch import nn

from fastvar.ops import PolicyLoss


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self._last
        self._last = now


def loss_metrics(loss: PolicyLoss) -> dict[str, torch.Tensor]:
    names = ("loss", "kl", "entropy", "clip_fraction", "ratio")
    shares = {f"gradient_share/{k}": share for k, share in enumerate(loss.gradient_share)}
    return {**{name: getattr(loss, name) for name in names}, **shares}


def peak_memory() -> float:
    """MiB that this process has held at most: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def fingerprint(model: nn.Module) -> int:
    """Of all weights: a run goes on only with the model that it began with, which its KL is measured to."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def spread(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.std(correction=0))
