"""How much of a reward the coarse state decides: by hand, and on rewards whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastvar.models import SamplingOptions
from fastvar.rl import Prompts
from fastvar.rl.choose_middle import MiddleShare, explained_shares, intraclass_correlation, recommended_middle
from fastvar.rl.rewards import RewardSum
from tests.helpers.policies import policy, redness


def test_by_hand() -> None:
    """One prompt, classes (0, 2) and (4, 6): mean squares 16 between and 2 within, ICC (16 - 2) / (16 + 2)."""
    assert intraclass_correlation(torch.tensor([[[0.0, 2.0], [4.0, 6.0]]])) == pytest.approx(14 / 18)


def test_extremes() -> None:
    state = torch.arange(24.0).view(4, 6, 1).expand(4, 6, 8)
    assert intraclass_correlation(state) == pytest.approx(1)
    noise = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
    assert abs(intraclass_correlation(noise)) < 0.05
    assert intraclass_correlation(noise + state[:1]) > 0.7
    prompts = 100 * torch.arange(40.0)[:, None, None]  # a prompt's own level explains nothing within it
    assert abs(intraclass_correlation(noise + prompts)) < 0.05
    with pytest.raises(ValueError, match="all scores are equal"):
        intraclass_correlation(torch.ones(1, 2, 2))


def test_shares_of_a_policy() -> None:
    """The mean colour is decided early, the last scale's details late; a random reward by nothing."""

    def random(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return torch.rand(len(images), generator=generator)

    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"prefixes": 8, "continuations": 8, "options": SamplingOptions()}
    shares = explained_shares(policy(), RewardSum({"red": redness}), Prompts(["1", "2"]), averaged_over=4, **options)
    assert [share.middle for share in shares] == [1, 2]
    assert 0 <= shares[0].share < shares[1].share <= 1
    for share in shares:
        assert share.averaged == pytest.approx(4 * share.share / (1 + 3 * share.share))
    nothing = explained_shares(policy(), RewardSum({"random": random}), Prompts(["1", "2"]), **options)
    assert all(abs(share.share) < 0.25 for share in nothing)


def test_recommendation() -> None:
    shares = [MiddleShare(1, 0.1, 0.2), MiddleShare(2, 0.4, 0.57), MiddleShare(3, 0.9, 0.95)]
    assert recommended_middle(shares) == 2
    assert recommended_middle(shares[:1]) == 1


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="explained_shares: prefixes: expected at least 2, got 1"):
        explained_shares(policy(), RewardSum({"red": redness}), Prompts(["1"]), prefixes=1, options=SamplingOptions())
