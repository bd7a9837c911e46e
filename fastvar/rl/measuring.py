"""What a trainer measures besides its rewards: seconds, memory, the loss's parts, which weights it began with."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import nn

from fastvar.ops import PolicyLoss
from fastvar.profiling import annotate
from fastvar.statistics import centred


class Clock:
    """Seconds by part, which are also ranges in a profile."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with annotate(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


def loss_metrics(loss: PolicyLoss, part: torch.Tensor, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a part of a batch adds to the batch's loss and means; part, whole: (K,), their `token_totals`."""
    weight = part.sum() / whole.sum()
    weights = torch.where(whole > 0, part / whole, 0)
    means = {name: getattr(loss, name) * weight for name in ("kl", "entropy", "clip_fraction", "ratio")}
    by_scale = {
        "gradient_share": loss.gradient_share * weight,
        "entropy": loss.scale_entropy * weights,
        "ratio": loss.scale_ratio * weights,
    }
    each = {f"{name}/{k}": value for name, values in by_scale.items() for k, value in enumerate(values)}
    return {"loss": loss.loss.detach(), **means, **each}


def peak_memory() -> float:
    """MiB that this process has held at most: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def fingerprint(model: nn.Module) -> int:
    """A checksum of all weights: a run goes on only with the model that it began with, which its KL is measured to."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def spread(values: torch.Tensor) -> float:
    """Mean standard deviation of the rows of scores (n, m), of those that are not missing."""
    return float(centred(values).spread.nanmean())
