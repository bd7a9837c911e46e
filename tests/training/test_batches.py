"""Batches depend on the step alone."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from fastvar.training.batches import StepSampler, step_loader


def sampler(first: int, last: int, **changes: int) -> StepSampler:
    settings = {"length": 10, "batch_size": 4, "seed": 3, "first_step": first, "last_step": last}
    return StepSampler(**{**settings, **changes})


def test_starting_later_gives_the_same_batches() -> None:
    assert list(sampler(0, 12))[5:] == list(sampler(5, 12))


def test_every_epoch_draws_every_item_once() -> None:
    drawn = [index for pairs in sampler(0, 10) for _, index in pairs]
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_processes_share_a_step() -> None:
    whole = list(sampler(0, 6, batch_size=8))
    halves = [list(sampler(0, 6, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


class Noisy:
    """Items that draw from torch's global random state, as random crops do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "noise": torch.rand(3)}


class Told(Noisy):
    """A worker is told to stop with the run's whole group."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_workers_outlive_the_first_signal() -> None:
    assert len(list(step_loader(Told(), sampler(0, 2), workers=1))) == 2  # of ten items, eight of them: index 3 too


def test_augmentation_depends_on_the_position_alone() -> None:
    torch.manual_seed(0)
    straight = [batch["noise"] for batch in step_loader(Noisy(), sampler(0, 6))]
    torch.manual_seed(1)
    resumed = [batch["noise"] for batch in step_loader(Noisy(), sampler(3, 6))]
    workers = [batch["noise"] for batch in step_loader(Noisy(), sampler(3, 6), workers=2)]
    for a, b, c in zip(straight[3:], resumed, workers, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(straight[0], straight[3])
