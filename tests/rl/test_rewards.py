"""Rewards against hand computation; a reward that misbehaves is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fastvar.data import Reading
from fastvar.pictures import to_uint8
from fastvar.rl.rewards import ColourReward, JPEGSizeReward, OCRReward, Reward, RewardSum, available, create, register
from fastvar.rl.rewards.ocr import ocr_score

IMAGES = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["10", "20", "30"]
LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("truth", "read", "expected"),
    [
        (["42"], [("42", 0.9)], 0.9 + 0.9),
        (["42"], [], -0.6),  # the bags differ by all characters
        (["42"], [("43", 0.8)], 0 + 0.5 * 0.8 - 0.6 * 2 / 4),
        (["Cat"], [("cAT", 1.0)], 2.0),  # lower case
        (["42"], [("42", 0.9), ("42", 0.5)], 0.5 + 0.9 - 0.6 * 2 / 6),  # repetition does not pay
        (["ab", "cd"], [("ab", 1.0)], 0.5 + 0.5 - 0.6 * 2 / 6),
        (["ab"], [("abcd", 1.0)], 0.5 - 0.6 * 2 / 6),
        (["12"], [("21", 1.0)], 0.0),  # same characters, other order: distance 2 of 2
    ],
)
def test_ocr_by_hand(truth: list[str], read: list[tuple[str, float]], expected: float) -> None:
    assert ocr_score(truth, read) == pytest.approx(expected)


def test_ocr_needs_words() -> None:
    with pytest.raises(ValueError, match="ocr_score: truth: expected at least one word"):
        ocr_score([], [])


def test_ocr_with_any_reader() -> None:
    def reader(images: torch.Tensor) -> Sequence[Reading]:
        box = torch.tensor([[2.2, 3.7, 5.5, 6.2]])
        read = Reading("1", box, torch.ones(1), 1.0)
        return [read, Reading("", torch.zeros(0, 4), torch.zeros(0), 0.0)]

    scores, mask = OCRReward(reader)(torch.rand(2, 3, 10, 10), ["1", "1"])
    assert scores.tolist() == pytest.approx([2.0, -0.6])
    assert mask is not None and mask[0].nonzero().amin(0).tolist() == [3, 2]
    assert mask[0].nonzero().amax(0).tolist() == [6, 5] and mask[0].sum() == 4 * 4
    assert mask[1].all()


def test_jpeg_size() -> None:
    flat, busy = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32)
    small = JPEGSizeReward()(torch.cat([flat, busy])).scores
    large = JPEGSizeReward(larger=True)(torch.cat([flat, busy])).scores
    assert small[0] > small[1] and torch.equal(large, -small) and 0.2 < large[0] < large[1] < 10
    assert JPEGSizeReward(quality=10)(busy).scores > small[1]
    with pytest.raises(ValueError, match="quality: expected 1 to 95, got 0"):
        JPEGSizeReward(quality=0)


def test_eight_bits_are_the_nearest() -> None:
    values = torch.tensor([-1.0, 1.4 / 255, 1.6 / 255, 2.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 1, 2, 255]


def redness(images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def test_weighted_sum_and_each_reward() -> None:
    def prompt(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        mask[:, 2, 3] = True
        return Reward(torch.tensor([float(p) for p in prompts]), mask)

    both = RewardSum({"red": redness, "prompt": prompt}, {"prompt": 0.1})
    total, (each, _) = both(IMAGES, PROMPTS), both.ask(IMAGES, PROMPTS)
    assert each["prompt"].tolist() == [10, 20, 30]
    torch.testing.assert_close(total.scores, each["red"] + 0.1 * each["prompt"])
    assert total.mask is None  # redness is decided everywhere
    masked = RewardSum({"red": redness, "prompt": prompt}, {"red": 0.0})(IMAGES, PROMPTS)
    assert masked.mask is not None and masked.mask.sum() == 3
    torch.testing.assert_close(masked.scores, each["prompt"])


def test_masks_of_several_rewards_are_put_together() -> None:
    def at(column: int) -> Any:
        mask = torch.zeros(3, 24, 32, dtype=torch.bool)
        mask[:, 0, column] = True
        return lambda images, prompts, references: Reward(torch.ones(3), mask)

    mask = RewardSum({"left": at(0), "right": at(9)})(IMAGES, PROMPTS).mask
    assert mask is not None and mask[0].nonzero().tolist() == [[0, 0], [0, 9]]


def test_standardised() -> None:
    total = RewardSum({"a": redness, "b": lambda i, p, r: 1000 * redness(i, p, r)}, standardise=True)(IMAGES, PROMPTS)
    assert total.scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert total.scores.std(correction=0).item() == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda i, p, r: torch.zeros(2), r"reward 'bad': scores: expected shape \(3,\), got \(2,\)"),
        (lambda i, p, r: [1.0, 2.0, 3.0], r"reward 'bad': scores: expected a tensor of shape \(3,\), got list"),
        (lambda i, p, r: np.zeros(3), r"reward 'bad': scores: expected a tensor of shape \(3,\), got ndarray"),
        (
            lambda i, p, r: Reward(torch.zeros(3), np.ones((3, 24, 32), bool)),  # type: ignore[arg-type]
            r"reward 'bad': mask: expected a tensor of shape \(3, 24, 32\), got ndarray",
        ),
        (lambda i, p, r: torch.full((3,), math.nan), "reward 'bad': scores: expected at least one finite, got none"),
        (
            lambda i, p, r: Reward(torch.zeros(3), torch.ones(3, 2, 2)),
            r"reward 'bad': mask: expected shape \(3, 24, 32\)",
        ),
        (lambda i, p, r: 1 / 0, "reward 'bad' raised ZeroDivisionError: division by zero"),
    ],
)
def test_misbehaving_reward_is_named(answer: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RewardSum({"red": redness, "bad": answer})(IMAGES, PROMPTS)


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("standardise", [False, True])
def test_one_missing_score_is_passed_on(missing: float, standardise: bool) -> None:
    """As NaN, whatever it was; the others are standardised among themselves."""
    some = RewardSum({"some": lambda i, p, r: torch.tensor([1.0, missing, 3.0])}, standardise=standardise)
    total, (each, _) = some(IMAGES, PROMPTS), some.ask(IMAGES, PROMPTS)
    assert total.scores[1].isnan() and each["some"][1].isnan()
    assert total.scores[[0, 2]].tolist() == pytest.approx([-1, 1] if standardise else [1, 3], abs=1e-5)


def test_images_that_no_two_rewards_score_are_refused() -> None:
    halves = {"a": [1.0, math.nan, math.inf], "b": [math.nan, 2.0, 3.0]}
    rewards = {name: lambda i, p, r, scores=scores: torch.tensor(scores) for name, scores in halves.items()}
    with pytest.raises(RuntimeError, match=r"rewards \('a', 'b'\): scores: expected an image that all score, got none"):
        RewardSum(rewards)(IMAGES, PROMPTS)
    assert RewardSum(rewards, {"b": 0.0})(IMAGES, PROMPTS).scores[0] == 1  # what only measures may be missing


@pytest.mark.parametrize(
    ("scores", "standardised"),
    [
        ([0.0, 1.0, LEAST, LEAST], [1, 1, -1, -1]),
        ([1e25, 2e25, 3e25, 4e25], [-(1.8**0.5), -(0.2**0.5), 0.2**0.5, 1.8**0.5]),
        ([2.0**24, 2.0**24 + 2, 2.0**24 + 4, 2.0**24 + 6], [-(1.8**0.5), -(0.2**0.5), 0.2**0.5, 1.8**0.5]),
    ],
)
def test_sums_of_large_scores(scores: list[float], standardised: list[float]) -> None:
    """Neither the sum nor what it is standardised with leaves the range of numbers."""
    images = torch.zeros(4, 3, 2, 2)
    rewards = {name: lambda i, p, r: torch.tensor(scores) for name in ("one", "two")}
    total = RewardSum(rewards, {"two": 2.0})(images, PROMPTS).scores
    torch.testing.assert_close(total, 3 * torch.tensor(scores).double())
    each = {name: torch.tensor(scores) for name in rewards}  # in float32
    torch.testing.assert_close(RewardSum(rewards, {"two": 2.0}).combine(each), total)
    found = RewardSum(rewards, standardise=True)(images, PROMPTS).scores
    assert found.tolist() == pytest.approx([2 * score for score in standardised], rel=1e-5)


def test_registry() -> None:
    assert {"ocr", "jpeg"} <= set(available())
    assert isinstance(create("jpeg", larger=True), JPEGSizeReward)
    with pytest.raises(ValueError, match=r"create: name: expected one of .*'ocr'.*, got 'beauty'"):
        create("beauty")
    with pytest.raises(ValueError, match="register: name: expected a new one, got 'jpeg'"):
        register("jpeg")(JPEGSizeReward)
    with pytest.raises(ValueError, match="RewardSum: weights: expected names out of"):
        RewardSum({"red": redness}, {"blue": 1.0})
    for weight in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"RewardSum: weights: expected finite numbers, got .* for 'red'"):
            RewardSum({"red": redness}, {"red": weight})
    with pytest.raises(ValueError, match="RewardSum: rewards: expected at least one"):
        RewardSum({})


def test_colour() -> None:
    """Ten times red minus the mean of the others, over all or a corner, whose pixels are the mask."""
    red = torch.zeros(2, 3, 8, 10)
    red[0, 0] = 1
    red[1, 0, :2, :3] = 1
    assert ColourReward()(red).scores.tolist() == pytest.approx([10, 10 * 6 / 80])
    assert ColourReward()(red).mask is None
    corner = ColourReward(region=(0, 0, 0.25, 0.2))(red)
    assert corner.scores.tolist() == [10, 10] and corner.mask is not None
    assert corner.mask.sum((1, 2)).tolist() == [6, 6] and corner.mask[:, :2, :3].all()
    assert ColourReward(channel="blue")(red).scores[0] == pytest.approx(-5)
    contrast = ColourReward(region=(0, 0, 0.25, 0.2), contrast=True)(red)
    assert contrast.scores.tolist() == [0, 10] and torch.equal(contrast.mask, corner.mask)
    for options in ({"channel": "pink"}, {"region": (0.5, 0, 0.5, 1)}, {"contrast": True}):
        with pytest.raises(ValueError, match="ColourReward"):
            ColourReward(**options)
