"""Batches depend on the step alone."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import pytest
import torch

from fastvar.random import derive, uniform
from fastvar.training import TokenDataset
from fastvar.training.batches import BucketSampler, StepSampler, step_loader, step_sampler


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


BUCKETS = [0] * 9 + [2] * 3 + [1] * 18


def bucket_sampler(first: int, last: int, batch_size: int = 4, **changes: int) -> BucketSampler:
    return BucketSampler(BUCKETS, batch_size, seed=3, first_step=first, last_step=last, **changes)


def test_a_batch_has_one_bucket() -> None:
    """Each in proportion to its items, which come once before they come again; what is small repeats within a batch."""
    steps = list(bucket_sampler(0, 400))
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for pairs in steps:
        (bucket,) = {BUCKETS[index] for _, index in pairs}
        drawn[bucket] += [index for _, index in pairs]
    assert [position for pairs in steps for position, _ in pairs] == list(range(1600))
    for bucket, indices in drawn.items():
        items = sorted(i for i, of in enumerate(BUCKETS) if of == bucket)
        count = len(items)
        assert sorted(indices[:count]) == sorted(indices[count : 2 * count]) == items
        assert len(indices) / 1600 == pytest.approx(count / 30, abs=0.08)
    assert steps != list(BucketSampler(BUCKETS, 4, seed=4, first_step=0, last_step=400))


def test_buckets_of_later_steps_and_of_several_processes() -> None:
    straight = list(bucket_sampler(0, 20))
    assert list(bucket_sampler(7, 20)) == straight[7:] and list(bucket_sampler(0, 9)) == straight[:9]
    whole = list(bucket_sampler(0, 6, batch_size=8))
    halves = [list(bucket_sampler(0, 6, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert list(bucket_sampler(0, 0)) == []


def test_buckets_of_steps_by_definition() -> None:
    draws = uniform(torch.tensor(derive(3, "buckets")), torch.tensor(0), torch.arange(40)).tolist()
    expected = [0 if draw < 9 / 30 else 1 if draw < 27 / 30 else 2 for draw in draws]
    assert [BUCKETS[pairs[0][1]] for pairs in bucket_sampler(0, 40)] == expected


def test_buckets_of_equal_size_have_orders_of_their_own() -> None:
    orders: list[list[int]] = [[], []]
    for pairs in BucketSampler([0, 1] * 20, 4, seed=3, first_step=0, last_step=40):
        orders[pairs[0][1] % 2] += [index // 2 for _, index in pairs]
    assert orders[0][:20] != orders[1][:20] and sorted(orders[0][:20]) == sorted(orders[1][:20])


def test_a_data_set_with_buckets_has_its_sampler() -> None:
    class Data(Noisy):
        buckets = BUCKETS

    options = {"seed": 3, "first_step": 0, "last_step": 9}
    assert list(step_sampler(Data(), 4, **options)) == list(bucket_sampler(0, 9))
    assert list(step_sampler(Noisy(), 4, **options)) == list(sampler(0, 9))


class Noisy:
    """Items that draw from the global random states of torch, NumPy and Python, as random crops do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]
        return {"image": torch.tensor(noise, dtype=torch.float64)}


class Told(Noisy):
    """A worker is told to stop with the run's whole group."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_workers_outlive_the_first_signal() -> None:
    assert len(list(step_loader(Told(), sampler(0, 2), workers=1))) == 2  # of ten items, eight of them: index 3 too


class NoisyBatches(Noisy):
    def batch(self, indices: list[int]) -> dict[str, Any]:
        return torch.utils.data.default_collate([self[index] for index in indices])


def noise(data: Noisy, state: int, *steps: int, workers: int = 0, **changes: int) -> torch.Tensor:
    """(steps x batch, 3), drawn from other random states each time."""
    torch.manual_seed(state)
    np.random.seed(state)
    random.seed(state)
    return torch.cat([batch["image"] for batch in step_loader(data, sampler(*steps, **changes), workers=workers)])


@pytest.mark.parametrize("data", [Noisy(), NoisyBatches()])
def test_augmentation_depends_on_the_position_alone(data: Noisy) -> None:
    straight = noise(data, 0, 0, 6)
    assert torch.equal(noise(data, 1, 3, 6), straight[12:])
    assert all(len(column.unique()) == 24 for column in straight.T)  # two epochs and a half, of ten items each
    ranks = [noise(data, 2, 0, 3, rank=rank, world_size=2) for rank in (0, 1)]
    halves = torch.stack(ranks).unflatten(1, (3, 4)).transpose(0, 1).flatten(0, 2)
    assert torch.equal(halves, straight)
    if not hasattr(data, "batch"):
        assert torch.equal(noise(data, 3, 3, 6, workers=2), straight[12:])
    assert not torch.equal(noise(data, 0, 0, 6, seed=4), straight)


@pytest.mark.parametrize("data", [Noisy(), NoisyBatches()])
def test_drawing_items_leaves_the_random_states_alone(data: Noisy) -> None:
    noise(data, 0, 0, 6)
    after = torch.rand(()).item(), np.random.rand(), random.random()
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(0)
    assert after == (torch.rand(()).item(), np.random.rand(), random.random())


class FirstPixels:
    """Stands in for a tokenizer: the image is its tokens."""

    def parameters(self) -> Any:
        return iter([torch.empty(0)])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize("data", [Noisy(), NoisyBatches()])
def test_cached_tokens_follow_from_the_seed(data: Noisy) -> None:
    def tokens(seed: int) -> torch.Tensor:
        return TokenDataset(data, FirstPixels(), batch_size=4, seed=seed).columns["tokens"]  # type: ignore[arg-type]

    first = tokens(0)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert torch.equal(tokens(0), first) and not torch.equal(tokens(1), first)
    assert all(len(column.unique()) == 10 for column in first.T)
