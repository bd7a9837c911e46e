"""Rewards that are only watched, and what rewards say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.models import SamplingOptions
from fastvar.rl import Prompts, RLConfig, VMRGRPOTrainer, evaluate_policy
from fastvar.rl.rewards import ColourReward, JPEGSizeReward, Reward, RewardSum
from tests.helpers.tiny import tiny_var

RED, BLUE = ColourReward(), ColourReward(channel="blue")
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = Prompts(["a", "b"], torch.tensor([0, 1]))


def test_nothing_of_a_held_out_reward_is_in_the_sum() -> None:
    plain, watched = RewardSum({"red": RED}), RewardSum({"red": RED}, held_out={"blue": BLUE})
    each, mask = watched.ask(IMAGES, ["a"] * 4)
    assert set(each) == {"red"} and mask is None and watched.weights == {"red": 1.0}
    each, _ = watched.ask(IMAGES, ["a"] * 4, held_out=True)
    assert each["blue"].tolist() == pytest.approx(BLUE(IMAGES).scores.tolist())
    assert torch.equal(watched.combine(each), plain.combine({"red": each["red"]}))
    assert torch.equal(watched(IMAGES, ["a"] * 4).scores, plain(IMAGES, ["a"] * 4).scores)
    local = RewardSum({"red": ColourReward(region=(0, 0, 0.5, 0.5))}, held_out={"blue": BLUE})
    mask = local.ask(IMAGES, ["a"] * 4, held_out=True)[1]
    assert mask is not None and not mask.all()  # what is held out decides nothing everywhere
    with pytest.raises(ValueError, match=r"held_out: expected rewards that are not in the sum, got \['red'\]"):
        RewardSum({"red": RED}, held_out={"red": RED})
    with pytest.raises(ValueError, match=r"rewards: expected other names than \['diversity'\]"):
        RewardSum({"red": RED}, held_out={"diversity": BLUE})


def test_a_text_that_a_held_out_reward_cannot_score() -> None:
    class Picky:
        def check_texts(self, texts: Any) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="reward 'picky': no"):
        RewardSum({"red": RED}, held_out={"picky": Picky()}).check_texts(["a"])  # type: ignore[dict-item]


def test_evaluations_show_it() -> None:
    reward = RewardSum({"red": RED}, held_out={"blue": BLUE})
    found = evaluate_policy(tiny_var(), reward, PROMPTS, samples=8, options=SamplingOptions())
    assert found.metrics["return"] == pytest.approx(found.metrics["red"])
    assert found.metrics["held_out/blue"] == pytest.approx(BLUE(found.images).scores.mean().item(), abs=1e-5)
    assert "blue" not in found.metrics and "held_out/blue" in found.intervals


def test_a_run_logs_it(tmp_path: Path) -> None:
    """At evaluations, and once what each reward is; nothing is trained by it, and it may change when a run goes on."""
    config = RLConfig(iterations=1, prompts=1, group_size=2, middle=0, evaluate_every=1, evaluation_samples=8)

    def trained(held_out: dict[str, Any], iterations: int = 1) -> list[dict[str, float]]:
        reward = RewardSum({"red": RED}, held_out=held_out)
        changed = RLConfig(**{**config.__dict__, "iterations": iterations})
        VMRGRPOTrainer(tiny_var(), reward, PROMPTS, changed, tmp_path / "run").train()
        return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    lines = trained({"size": JPEGSizeReward()})
    assert all("evaluation/held_out/size" in line for line in lines)
    assert not any(name.startswith("reward/") and "size" in name for line in lines for name in line)
    told = json.loads((tmp_path / "run/rewards.json").read_text())
    assert told["red"]["weight"] == 1.0 and told["red"]["range"] == "-10 to 10"
    assert told["size"] == {
        **{"weight": None, "weights": "none", "preprocessing": "8 bits a channel"},
        **{"range": "up to 0, kilobytes", "memory": 0},
    }
    assert "evaluation/held_out/blue" in trained({"blue": BLUE}, 2)[-1]
    with pytest.raises(ValueError, match=r"evaluate_every: expected at least 1, as rewards are held out \('blue',\)"):
        VMRGRPOTrainer(
            tiny_var(),
            RewardSum({"red": RED}, held_out={"blue": BLUE}),
            PROMPTS,
            RLConfig(middle=0),
            tmp_path / "other",
        )


def test_it_is_tried_before_the_first_step(tmp_path: Path) -> None:
    def broken(images: torch.Tensor, prompts: Any, references: Any) -> Reward:
        raise KeyError("x")

    with pytest.raises(RuntimeError, match=r"before the first step.*reward 'broken' raised KeyError"):
        VMRGRPOTrainer(
            tiny_var(),
            RewardSum({"red": RED}, held_out={"broken": broken}),
            PROMPTS,
            RLConfig(middle=0, evaluate_every=1),
            tmp_path,
        )


def test_a_reward_that_says_nothing_of_itself() -> None:
    told = RewardSum({"mine": lambda images, prompts, references: Reward(images.mean((1, 2, 3)))}).descriptions()
    assert told["mine"]["weights"] == told["mine"]["range"] == "not said"
