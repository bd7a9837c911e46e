"""Batches that depend on the step alone, so that an interrupted run goes on exactly where it stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastvar.random import derive, uniform
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
        order = _Order(self.length, self.seed)
        for step in range(self.first_step, self.last_step):
            positions = self._positions(step)
            yield [(position, order[position]) for position in positions]

    def _positions(self, step: int) -> range:
        """This process's part of a step, which has `world_size` batches."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)


class _Order:
    """What comes at each position: a new permutation of `length` items every epoch, of a bucket's own if it is one."""

    def __init__(self, length: int, seed: int, *bucket: int) -> None:
        self.length, self.seed, self.bucket = length, seed, bucket
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch, *self.bucket))
            self.epoch, self.permutation = epoch, torch.randperm(self.length, generator=generator)
        return int(self.permutation[place])


class BucketSampler(StepSampler):
    """As `StepSampler`, with batches of one bucket each.

    The bucket of a step is drawn, with a chance in proportion to its items, and is the same in all processes. Each
    bucket goes through a new permutation of its items again and again; one that is smaller than a batch repeats them.

    Args:
        buckets: the bucket of each item, 0 and up.
        options: those of `StepSampler` but for the length.
    """

    def __init__(self, buckets: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(len(buckets), batch_size, **options)
        self.buckets = torch.as_tensor(buckets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        counts = self.buckets.bincount()
        items = [(self.buckets == bucket).nonzero()[:, 0].tolist() for bucket in range(len(counts))]
        orders = [_Order(len(own), self.seed, bucket) for bucket, own in enumerate(items)]
        steps = torch.arange(self.last_step)
        # by counters, so that a step's bucket does not depend on how many steps there are
        drawn = uniform(torch.tensor(derive(self.seed, "buckets")), torch.tensor(0), steps).double() * self.length
        chosen = torch.searchsorted(counts.cumsum(0).double(), drawn, right=True)
        done = chosen[: self.first_step].bincount(minlength=len(counts)).tolist()
        for step in range(self.first_step, self.last_step):
            bucket = int(chosen[step])
            own = self._positions(done[bucket])
            done[bucket] += 1
            indices = [items[bucket][orders[bucket][position]] for position in own]
            yield list(zip(self._positions(step), indices, strict=True))


def step_sampler(dataset: Any, batch_size: int, **options: Any) -> StepSampler:
    """The sampler of a data set: by its `buckets`, if it has them, else over all of it."""
    if hasattr(dataset, "buckets"):
        return BucketSampler(dataset.buckets, batch_size, **options)
    return StepSampler(len(dataset), batch_size, **options)


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
