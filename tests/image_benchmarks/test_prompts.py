"""Prompts by category, scored by any rewards; HPS with a small CLIP of random weights; by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch

from fastvar.data.metrics import mean_interval
from fastvar.image_benchmarks import HPSBenchmark, PromptBenchmark, run_benchmark
from fastvar.image_benchmarks.prompts import read_categories
from fastvar.rl.rewards import ColourReward, JPEGSizeReward, RewardSum
from tests.helpers.pictures import save_images, smooth_images

open_clip = pytest.importorskip("open_clip")


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "photo.json").write_text(json.dumps(["a dog", "a cat"]))
    (tmp_path / "anime.txt").write_text("a bird\n\n")
    items = read_categories(tmp_path, 2)
    assert [item.name for item in items] == [
        *("anime/00000", "anime/00000_1"),
        *("photo/00000", "photo/00000_1", "photo/00001", "photo/00001_1"),
    ]
    assert [item.prompt for item in items[::2]] == ["a bird", "a dog", "a cat"]
    assert {item.group for item in items} == {"anime", "photo"}
    (tmp_path / "photo.json").write_text('["a red\\tdog on grass"]')
    (tmp_path / "anime.txt").write_text("dog\ta red\u2028dog\n", encoding="utf-8")
    assert [(item.prompt, item.text) for item in read_categories(tmp_path)] == [
        ("dog", "a red\u2028dog"),
        ("a red\tdog on grass", "a red\tdog on grass"),
    ]
    (tmp_path / "photo.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"data: expected a list of texts, got something else in .*photo\.json"):
        read_categories(tmp_path)
    with pytest.raises(ValueError, match=r"data: expected files of prompts .* got none"):
        read_categories(tmp_path / "nowhere")


def test_any_rewards(tmp_path: Path) -> None:
    """The label before a tab is for the model alone; a score that is missing is in no mean."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sketch.txt").write_text("dog\ta sketch of a dog\n7\ta sketch of a cat\na line\n")
    asked: list[str] = []

    def unsure(images: torch.Tensor, prompts: list[str], references: object) -> torch.Tensor:
        asked.extend(prompts)
        return torch.tensor([torch.nan, 2.0, 4.0])

    reward = RewardSum({"red": ColourReward(), "unsure": unsure}, held_out={"size": JPEGSizeReward()})  # type: ignore[dict-item]
    benchmark = PromptBenchmark(tmp_path / "data", reward)
    assert [item.prompt for item in benchmark.items] == ["dog", "7", "a line"]
    images = smooth_images(3)
    save_images(tmp_path / "images", [item.name for item in benchmark.items], images)
    figures = run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")["figures"]
    assert asked == ["a sketch of a dog", "a sketch of a cat", "a line"]
    assert figures["unsure"] == 3.0 and figures["categories"]["sketch"]["unsure"] == 3.0
    size = JPEGSizeReward()(images).scores
    assert figures["held_out/size"] == pytest.approx(size.mean().item()) and "held_out/size_95" in figures
    assert figures["red"] == pytest.approx(ColourReward()(images).scores.mean().item(), abs=1e-5)


def test_scores_by_something_else_are_made_again(tmp_path: Path, tiny_clip: str) -> None:
    """In one folder: another option of a reward, another benchmark by the same reward."""
    from fastvar.rl.rewards import HPSv2Reward

    (tmp_path / "data").mkdir()
    (tmp_path / "data/photo.txt").write_text("a dog\n")
    images = smooth_images(1)
    save_images(tmp_path / "images", ["photo/00000"], images)

    def figures(benchmark: PromptBenchmark) -> dict[str, float]:
        return run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")["figures"]

    for channel in ("red", "blue"):
        reward = ColourReward(channel=channel)
        found = figures(PromptBenchmark(tmp_path / "data", RewardSum({"colour": reward})))
        assert found["colour"] == pytest.approx(float(reward(images).scores), abs=1e-5)
    hps = HPSv2Reward(checkpoint=None, model=tiny_clip)
    score = figures(PromptBenchmark(tmp_path / "data", RewardSum({"hpsv2": hps})))["hpsv2"]
    assert figures(HPSBenchmark(tmp_path / "data", hps))["hpsv2"] == pytest.approx(100 * score, rel=1e-5)


def test_by_hand(tmp_path: Path, tiny_clip: str) -> None:
    from fastvar.rl.rewards import HPSv2Reward

    (tmp_path / "data").mkdir()
    (tmp_path / "data/photo.txt").write_text("a dog\na cat\n")
    (tmp_path / "data/paintings.txt").write_text("a sea\n")
    reward = HPSv2Reward(checkpoint=None, model=tiny_clip)
    benchmark = HPSBenchmark(tmp_path / "data", reward, per_prompt=2)
    images = smooth_images(6)
    save_images(tmp_path / "images", [item.name for item in benchmark.items], images, ".bmp")
    figures = run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")["figures"]
    scores = [
        100 * float(reward(image[None], [text]).scores)
        for image, text in zip(images, ["a sea"] * 2 + ["a dog"] * 2 + ["a cat"] * 2, strict=True)
    ]
    assert figures["hpsv2"] == pytest.approx(fmean(scores), abs=1e-4)
    assert figures["categories"]["paintings"]["hpsv2"] == pytest.approx(fmean(scores[:2]), abs=1e-4)
    assert figures["categories"]["photo"]["hpsv2"] == pytest.approx(fmean(scores[2:]), abs=1e-4)
    prompts = [fmean(scores[row : row + 2]) for row in (0, 2, 4)]  # images of one prompt are no independent scores
    assert figures["hpsv2_95"] == pytest.approx(mean_interval(prompts), abs=1e-3)
    assert figures["categories"]["paintings"]["hpsv2_95"] is None
    spread = torch.stack([(images[i] - images[i + 1]).square().mean().sqrt() for i in (0, 2, 4)])
    assert figures["diversity"] == pytest.approx(spread.mean().item(), abs=1e-6)
