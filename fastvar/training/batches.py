"""Batches that depend on the step alone, so that an interrupted run goes on exactly where it stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastvar.random import derive
from fastvar.training.interrupts import outlive_the_first_signal


class StepSampler:
    """Yields, for each step from `first_step` on, the (position, index) pairs of this process's batch.

    The position counts all samples ever drawn; the index goes through a new permutation of the data set every epoch.

    Args:
        length: items of the data set.
        batch_size: items per process and step.
        seed: of the permutations.
        first_step, last_step: the range of steps.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"StepSampler: length, batch_size: expected at least 1, got {length} and {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(self.last_step - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first_step, self.last_step):
            first = (step * self.world_size + self.rank) * self.batch_size
            pairs = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
                    permutation = torch.randperm(self.length, generator=generator)
                pairs.append((position, int(permutation[position % self.length])))
            yield pairs


@contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """The random states that transforms draw from (torch's on the CPU, NumPy's, Python's) follow from two numbers
    alone inside, and are as before afterwards."""
    key = derive(seed, "position", position)
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        random.seed(key)
        np.random.seed(key)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class _SeededByPosition(Dataset):
    """Draws item `index` under random states that depend on the position alone (random crops and the like)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        position, index = pair
        with seeded(self.seed, position):
            return self.dataset[index]


def step_loader(dataset: Any, sampler: StepSampler, *, workers: int = 0) -> Iterator[Any]:
    """The batches of a sampler's steps: by the data set's own `batch(indices)` if it has one, else by a DataLoader.

    What a data set draws from the global random states depends on the sample's position alone (with `batch`, on that of
    the batch's first sample): it is other for each sample, process and epoch, and the same whatever the number of
    workers and after a resume.
    """
    if hasattr(dataset, "batch"):
        return _own_batches(dataset, sampler)
    loader: DataLoader[Any] = DataLoader(
        _SeededByPosition(dataset, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_the_first_signal,
        generator=torch.Generator(),  # else it draws a seed for its workers from the training's random state
    )
    return iter(loader)


def _own_batches(dataset: Any, sampler: StepSampler) -> Iterator[Any]:
    for pairs in sampler:
        with seeded(sampler.seed, pairs[0][0]):
            batch = dataset.batch([index for _, index in pairs])
        yield batch
