"""The middle return: between the mean and the best, and stable."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastvar.rl import middle_returns


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.1, 1.0, 7.0])
def test_definition(eta: float) -> None:
    rewards = noise(12)
    expected = eta * (rewards.view(3, 4) / eta).exp().mean(1).log()
    torch.testing.assert_close(middle_returns(rewards, 4, eta=eta), expected)


def test_one_continuation_is_its_reward() -> None:
    rewards = noise(5).float()
    for eta in (1e-3, 1.0, math.inf):
        torch.testing.assert_close(middle_returns(rewards, 1, eta=eta), rewards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("eta", [1e-4, 1.0, 1e5, 1e12])
def test_between_mean_and_best_at_any_size(dtype: torch.dtype, size: float, eta: float) -> None:
    rewards = (noise(40) * size).to(dtype)
    found, groups = middle_returns(rewards, 4, eta=eta), rewards.view(-1, 4)
    slack = 1e-5 * size
    assert (found >= groups.mean(1) - slack).all() and (found <= groups.amax(1) + slack).all()


def test_limits() -> None:
    rewards = noise(40).float()
    groups = rewards.view(-1, 4)
    torch.testing.assert_close(middle_returns(rewards, 4, eta=math.inf), groups.mean(1))
    torch.testing.assert_close(middle_returns(rewards, 4, eta=1e8), groups.mean(1))
    torch.testing.assert_close(middle_returns(rewards, 4, eta=1e-6), groups.amax(1), rtol=1e-4, atol=1e-4)
    # to second order V = mean + var / (2 eta), which a float32 log of a mean of exponentials near 1 would lose
    second = groups.mean(1) + groups.var(1, correction=0) / 2000
    torch.testing.assert_close(middle_returns(rewards, 4, eta=1000.0), second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [5e-324, 1e-38, 1e39, sys.float_info.max])
def test_limits_at_the_ends_of_what_a_float_holds(eta: float, dtype: torch.dtype) -> None:
    """Beyond float32 too: the best of the continuations or their mean, never NaN."""
    rewards = noise(40).to(dtype)
    groups = rewards.view(-1, 4)
    torch.testing.assert_close(middle_returns(rewards, 4, eta=eta), groups.amax(1) if eta < 1 else groups.mean(1))


@pytest.mark.parametrize("eta", [1e-30, 1.0, 1e30, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_whose_sum_overflows(dtype: torch.dtype, eta: float) -> None:
    most = torch.finfo(dtype).max
    found = middle_returns(torch.tensor([most, most, -most, -most, -most, most], dtype=dtype), 2, eta=eta)
    assert found.tolist() == [most, -most, 0.0 if math.isinf(eta) else most]


def test_far_from_the_mean() -> None:
    """Where exp overflows the best continuation's own share of the mean still counts: eta log(1 / K)."""
    found = middle_returns(torch.tensor([0.0, 2000.0], dtype=torch.float64), 2)
    assert found.item() == pytest.approx(2000 - math.log(2), rel=1e-12)


def test_offset_takes_no_digits() -> None:
    """Continuations of 2^24 and two above it in float32, which would round their sum."""
    rewards = torch.tensor([2.0**24, 2.0**24 + 2, 2.0**24 + 2, 2.0**24 + 4])
    assert middle_returns(rewards, 4, eta=math.inf).item() == 2.0**24 + 2


def test_order_of_the_continuations_does_not_count() -> None:
    """States with the same rewards are worth the same to the last bit: their group has no spread."""
    rewards = noise(7)
    shuffled = torch.stack([rewards[torch.randperm(7)] for _ in range(20)])
    for eta in (0.5, 100.0, math.inf):
        assert len(middle_returns(shuffled.flatten(), 7, eta=eta).unique()) == 1


def test_variance_falls_with_the_continuations() -> None:
    rewards = noise(40_000)
    spread = [middle_returns(rewards, k, eta=1e3).var().item() for k in (1, 2, 4, 8)]
    assert spread == pytest.approx([1.0, 0.5, 0.25, 0.125], rel=0.05)


def test_missing_rewards_are_left_out() -> None:
    rewards = torch.tensor([1.0, math.nan, 3.0, 3.0, math.nan, math.inf])
    found = middle_returns(rewards, 2)
    assert found[:2].tolist() == pytest.approx([1.0, 3.0]) and found[2].isnan()


@pytest.mark.parametrize(("rewards", "k", "eta"), [((5,), 2, 1.0), ((4,), 0, 1.0), ((2, 2), 2, 1.0), ((4,), 2, 0.0)])
def test_wrong_arguments(rewards: tuple[int, ...], k: int, eta: float) -> None:
    with pytest.raises(ValueError, match=r"middle_returns: (rewards|eta): expected"):
        middle_returns(torch.zeros(rewards), k, eta=eta)
