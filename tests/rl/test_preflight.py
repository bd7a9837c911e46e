"""What would stop a run later is said when the trainer is made, and names what is wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.evaluation import draw
from fastvar.models import SamplingOptions
from fastvar.rl import Prompts, RLConfig, VMRGRPOTrainer, evaluate_policy
from fastvar.rl.choose_middle import explained_shares
from fastvar.rl.preflight import check_prompts
from fastvar.rl.rewards import OCRReward, Reward, RewardSum
from tests.helpers.policies import policy, redness
from tests.helpers.tiny import tiny_var

PROMPTS = [str(i % 10) for i in range(99)]
LATE = [*PROMPTS, "12"]  # one character is the most
RED = RewardSum({"red": redness})
TOO_LONG = "expected texts of at most 1 characters out of .*, got '12'"


def trainer(output: Path, reward: Any = RED, prompts: Any = PROMPTS, **options: Any) -> VMRGRPOTrainer:
    return VMRGRPOTrainer(policy(), reward, prompts, RLConfig(middle=1), output, **options)


def test_prompts_of_training_and_evaluation(tmp_path: Path) -> None:
    for options in ({"prompts": LATE}, {"evaluation": LATE}):
        with pytest.raises(ValueError, match=TOO_LONG):
            trainer(tmp_path, **options)
    reward = RewardSum({"ocr": OCRReward(lambda images: [])})
    message = "reward 'ocr': OCRReward: prompts: expected at least one word in each, got ''"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, reward, [*PROMPTS, ""])


def test_prompts_of_functions_that_draw() -> None:
    """Also where the one that cannot be drawn is the last of many."""
    var: Any = policy()
    generate, drawn = var.generate, []
    var.generate = lambda labels, **options: drawn.append(labels) or generate(labels, **options)
    with pytest.raises(ValueError, match=TOO_LONG):
        draw(var, LATE, SamplingOptions(batch_size=1))
    few = SamplingOptions(batch_size=6)
    with pytest.raises(ValueError, match=TOO_LONG):
        evaluate_policy(var, RED, Prompts(LATE), samples=8, options=few)
    with pytest.raises(ValueError, match=TOO_LONG):
        explained_shares(var, RED, Prompts(LATE), options=few)
    assert not drawn
    assert len(draw(var, ["1", "2"], SamplingOptions(batch_size=1))) == len(drawn) == 2


def test_classes() -> None:
    var = tiny_var(num_classes=5)
    check_prompts(var, Prompts(["a", "b"], torch.tensor([0, 4])))
    for label in (5, -1):
        with pytest.raises(ValueError, match=r"labels: expected indices from 0 to 4, got"):
            check_prompts(var, Prompts(["a", "b"], torch.tensor([0, label])))
    with pytest.raises(ValueError, match="labels: expected a tensor of class indices"):
        check_prompts(var, Prompts(["a", "b"]))


def test_references() -> None:
    var, size = policy().add_subject(), policy().tokenizer.config.image_size
    good = torch.rand(2, 3, *size)
    check_prompts(var, Prompts(["1", "2"], references=good))
    check_prompts(var, Prompts(["1", "2"]))  # a model with a prefix can do without
    for references, message in (
        (good[:, :, :-1], r"expected floating-point \(N, \*\(3, .*\)\), got torch.float32 \(2, 3, "),
        ((good * 255).byte(), "expected floating-point .*, got torch.uint8"),
        (good * 2 - 1, r"expected numbers in \[0, 1\], got -"),
        (torch.where(good == good.amax(), math.nan, good), r"expected numbers in \[0, 1\], got nan to nan"),
    ):
        with pytest.raises(ValueError, match=f"Prompts: references: {message}"):
            check_prompts(var, Prompts(["1", "2"], references=references))
    with pytest.raises(ValueError, match="references: expected None, as the model has no subject prefix"):
        check_prompts(policy(), Prompts(["1", "2"], references=good))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images, prompts, references: 1 / 0, "reward 'bad' raised ZeroDivisionError"),
        (lambda images, prompts, references: torch.zeros(3), r"reward 'bad': scores: expected shape \(2,\)"),
        (lambda images, prompts, references: references.mean((1, 2, 3)), "reward 'bad' raised AttributeError"),
    ],
)
def test_rewards_on_a_blank_picture(answer: Any, message: str, tmp_path: Path) -> None:
    """One that only measures, too."""
    with pytest.raises(RuntimeError, match=f"before the first step, with a blank picture of '0': {message}"):
        trainer(tmp_path, RewardSum({"red": redness, "bad": answer}, {"bad": 0.0}))


def test_what_rewards_are_asked(tmp_path: Path) -> None:
    """Once for the prompts of training and once for those of evaluation, with their references; missing scores pass."""
    var, size = policy().add_subject(), policy().tokenizer.config.image_size
    references = torch.rand(2, 3, *size)
    asked: list[tuple[Sequence[str], Any]] = []

    def reward(images: torch.Tensor, prompts: Sequence[str], given: Any) -> Reward:
        assert images.shape == (2, 3, *size)
        asked.append((prompts, given))
        return Reward(torch.full((2,), math.nan))

    for evaluation in (None, ["7"]):
        prompts = Prompts(["1", "2"], references=references)
        VMRGRPOTrainer(var, RewardSum({"it": reward}), prompts, RLConfig(middle=1), tmp_path, evaluation=evaluation)
    assert [texts for texts, _ in asked] == [["1", "1"], ["1", "1"], ["7", "7"]]
    assert torch.equal(asked[0][1], references[[0, 0]]) and asked[2][1] is None


def test_rewards_that_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RewardSum: weights: expected one other than 0, as nothing would be learned"):
        trainer(tmp_path, RewardSum({"red": redness}, {"red": 0.0}))


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for weights, their average and, for what is trained, the moments."""
    var = policy()
    own = sum(tensor.nbytes for tensor in var.state_dict().values())
    needed = 2 * own + 2 * sum(parameter.nbytes for parameter in var.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed if folder == tmp_path else 0))
    trainer(tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=f"MiB of free space in {tmp_path} for a checkpoint, got"):
        trainer(tmp_path / "not" / "there" / "yet")
