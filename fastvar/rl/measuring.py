"""What a trainer measures: seconds, memory, rewards, the loss's parts, which weights it began with."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from zlib import crc32

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastvar.ops import PolicyLoss
from fastvar.profiling import annotate
from fastvar.rl.choose_middle import intraclass_correlation
from fastvar.rl.processes import Processes
from fastvar.rl.rewards import RewardSum
from fastvar.schedule import ScaleSchedule
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


def reward_metrics(
    reward: RewardSum, each: Mapping[str, torch.Tensor], combined: torch.Tensor, returns: torch.Tensor
) -> dict[str, float]:
    """What a rollout's rewards are.

    Args:
        reward: the sum of them.
        each: scores (B K,) by the names of rewards, of all processes.
        combined: (P, G, K), their sum, by group. With K of several continuations, and no score missing, the share of
            the variance within a group that the coarse state explains is measured too.
        returns: (P, G) of the B segments by group.
    """
    measured = {f"reward/{name}": scores.nanmean() for name, scores in each.items()}
    measured |= {f"reward_std/{name}": spread(scores[None]) for name, scores in each.items()}
    measured |= {
        "reward": reward.combine(each, standardise=False).nanmean(),
        "return": returns.nanmean(),
        "spread": spread(returns),
    }
    read = torch.stack([value.double() for value in measured.values()]).tolist()  # all at once
    metrics: dict[str, float] = dict(zip(measured, read, strict=True))
    if combined.shape[2] > 1 and combined.isfinite().all() and (combined != combined[:, :1, :1]).any():
        metrics["explained_by_coarse"] = intraclass_correlation(combined)
    return metrics


class UpdateMeasured(NamedTuple):
    """What an update measured, of all processes.

    Attributes:
        metrics: for the log.
        mean_gap: the mean difference of log-probabilities over the trained tokens.
        largest_gaps: their largest difference in each scale.
        gradient_norm: before clipping.
    """

    metrics: dict[str, float]
    mean_gap: float
    largest_gaps: list[float]
    gradient_norm: float


class UpdateMeasurements:
    """What the micro-batches of an update add up to; it stays on the device until it is read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, loss: PolicyLoss, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Take in a micro-batch; part, whole: (K,), its `token_totals` and those of the batch."""
        for name, value in loss_metrics(loss, part, whole).items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def read(
        self,
        processes: Processes,
        differences: torch.Tensor,
        mask: torch.Tensor,
        schedule: ScaleSchedule,
        gradient_norm: torch.Tensor,
    ) -> UpdateMeasured:
        """All of it on the host, in one go.

        Args:
            processes: of the run.
            differences: (n, L') of the log-probabilities in training and in the rollout.
            mask: (n, L') which tokens are trained.
            schedule: of the L' tokens.
            gradient_norm: ().
        """
        trained = mask > 0
        gaps = torch.where(trained, differences.abs(), 0)
        sums = {**self._sums, "gap": gaps.sum(dtype=torch.float64), "trained": trained.sum()}
        values = torch.stack([value.to(mask.device, torch.float64) for value in sums.values()])
        largest = processes.gather(torch.stack([part.amax() for part in gaps.split(schedule.lengths, 1)])[None]).amax(0)
        norm = gradient_norm.full_tensor() if isinstance(gradient_norm, DTensor) else gradient_norm
        numbers = torch.cat([processes.sum(values), largest.double(), norm.double().reshape(1)]).tolist()
        metrics = dict(zip(sums, numbers, strict=False))
        mean_gap = metrics.pop("gap") / max(metrics.pop("trained"), 1.0)
        return UpdateMeasured(metrics, mean_gap, numbers[len(sums) : -1], numbers[-1])


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


def spread(values: torch.Tensor) -> torch.Tensor:
    """Mean standard deviation of the rows of scores (n, m), of those that are not missing."""
    return centred(values).spread.nanmean()
