"""The trainer: it learns what is rewarded and nothing from noise, resumes exactly, survives what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from policies import policy, redness

from fastvar.rl import LossOptions, RLConfig, VMRGRPOTrainer
from fastvar.rl.rewards import RewardSum
from fastvar.training.log import read_metrics

PROMPTS = ["0", "1", "2", "3"]
QUICK = RLConfig(iterations=6, prompts=2, group_size=4, learning_rate=1e-3, save_every=1, coarse_updates=2)


def trainer(output: Path, config: RLConfig = QUICK, reward: Any = redness, seed: int = 0) -> VMRGRPOTrainer:
    return VMRGRPOTrainer(policy(seed), RewardSum({"it": reward}), PROMPTS, config, output)


def lines(output: Path) -> list[dict[str, float]]:
    found = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def learned(output: Path, reward: Any, seed: int, **changes: Any) -> float:
    config = replace(
        QUICK, iterations=50, prompts=4, group_size=8, learning_rate=3e-3, save_every=50, seed=seed, **changes
    )
    trainer(output, config, reward, seed).train()
    rewards = [line["reward/it"] for line in lines(output)]
    return fmean(rewards[-8:]) - fmean(rewards[:8])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_redness_rises(seed: int, tmp_path: Path) -> None:
    assert learned(tmp_path, redness, seed) > 0.3


def test_random_reward_teaches_nothing(tmp_path: Path) -> None:
    """The reward itself cannot rise, as it does not look at the images; what is watched is their redness."""

    def random(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return torch.rand(len(images), generator=generator)

    generator = torch.Generator().manual_seed(0)
    config = replace(QUICK, iterations=50, prompts=4, group_size=8, learning_rate=3e-3, save_every=50)
    rewards = RewardSum({"random": random, "red": redness}, {"red": 0.0})
    VMRGRPOTrainer(policy(), rewards, PROMPTS, config, tmp_path).train()
    red = [line["reward/red"] for line in lines(tmp_path)]
    assert abs(fmean(red[-8:]) - fmean(red[:8])) < 0.3  # what the test above asks of learning


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_resume_is_exact(stop_after: int, kl_weight: float, tmp_path: Path) -> None:
    """Weights, optimizer, average, prompts, seeds and the phase of the alternation."""
    config = replace(QUICK, loss=LossOptions(kl_weight=kl_weight))
    straight = trainer(tmp_path / "straight", config).train()
    first = trainer(tmp_path / "resumed", config)
    iteration = first.iteration

    def stopping(number: int) -> dict[str, float]:
        if number == stop_after:
            raise KeyboardInterrupt
        return iteration(number)

    first.iteration = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer(tmp_path / "resumed", config).train()
    assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_alternation() -> None:
    phases = [RLConfig(coarse_updates=3, fine_updates=1).phase(i) for i in range(8)]
    assert phases == ["coarse", "coarse", "coarse", "fine"] * 2
    assert {RLConfig(middle=0).phase(i) for i in range(8)} == {"whole"}


def test_what_is_logged(tmp_path: Path) -> None:
    config = replace(QUICK, iterations=3, loss=LossOptions(kl_weight=0.05))
    trainer(tmp_path, config).train()
    found = lines(tmp_path)
    assert [line["phase"] for line in found] == [1.0, 1.0, 2.0]
    assert all(line["ratio"] == 1 and line["rollout_difference"] < 1e-4 for line in found)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[2]["kl"] > 0
    shares = [found[2][f"gradient_share/{k}"] for k in range(3)]
    assert shares[:2] == [0, 0] and shares[2] == pytest.approx(1)
    assert json.loads((tmp_path / "settings.json").read_text())["rl"]["loss"]["kl_weight"] == 0.05


def test_per_action_normalisation_balances_the_scales(tmp_path: Path) -> None:
    spread = {}
    for alpha in (0.0, 0.6):
        config = replace(QUICK, iterations=1, prompts=4, group_size=16, middle=0, loss=LossOptions(panw_alpha=alpha))
        trainer(tmp_path / str(alpha), config).train()
        share = [lines(tmp_path / str(alpha))[0][f"gradient_share/{k}"] for k in range(3)]
        spread[alpha] = max(share) / min(share)
    assert spread[0.6] < spread[0.0] / 1.5


def test_rewards_that_are_nan_are_left_out(tmp_path: Path) -> None:
    def some(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        scores = redness(images, prompts, references)
        scores[0] = math.nan
        return scores

    trainer(tmp_path, replace(QUICK, middle=0), some).train()
    assert all(line["skipped"] == 0 and math.isfinite(line["gradient_norm"]) for line in lines(tmp_path))


def test_gradient_that_is_not_finite_skips_and_in_the_end_stops(tmp_path: Path) -> None:
    """The weights stay as they were before the first bad step."""
    broken = trainer(tmp_path, replace(QUICK, iterations=9, bad_steps=2))
    before = {k: v.clone() for k, v in broken.policy.state_dict().items()}
    update = broken.update

    def spoiled(loss: Any) -> float:
        return update(loss._replace(loss=loss.loss * math.nan))

    broken.update = spoiled  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="3 updates in a row had a gradient that is not finite"):
        broken.train()
    assert all(torch.equal(v, before[k]) for k, v in broken.policy.state_dict().items())


def test_reward_that_raises_loses_nothing(tmp_path: Path) -> None:
    calls = 0

    def breaks(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise TimeoutError("the scorer is gone")
        return redness(images, prompts, references)

    with pytest.raises(RuntimeError, match="reward 'it' raised TimeoutError: the scorer is gone"):
        trainer(tmp_path / "broken", reward=breaks).train()
    trainer(tmp_path / "straight").train()
    trainer(tmp_path / "broken").train()
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected parameters that require a gradient, got none"):
        VMRGRPOTrainer(policy().requires_grad_(False), RewardSum({"it": redness}), PROMPTS, QUICK, tmp_path)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        VMRGRPOTrainer(policy(), RewardSum({"it": redness}), [], QUICK, tmp_path)
    with pytest.raises(ValueError, match="RLConfig: group_size: expected at least 1, got 0"):
        trainer(tmp_path, replace(QUICK, group_size=0))
    trainer(tmp_path, replace(QUICK, iterations=1)).train()
    with pytest.raises(ValueError, match="coarse_updates, fine_updates: expected"):
        trainer(tmp_path, replace(QUICK, coarse_updates=0, fine_updates=0))
    with pytest.raises(ValueError, match=r"other settings \(rl.eta was 1.0, is 2.0"):
        trainer(tmp_path, replace(QUICK, eta=2.0)).train()
