"""What all benchmarks share: files found by name, scores kept and gone on from, a summary and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastvar.image_benchmarks import Item, run_benchmark, taken_prompts
from fastvar.image_benchmarks import scoring as module
from tests.helpers.pictures import save_images, smooth_images


class Brightness:
    """The mean of an image's pixels, and a text."""

    name = "brightness"

    def __init__(self, items: Sequence[Item], per_prompt: int = 1) -> None:
        self.items, self.per_prompt = list(items), per_prompt
        self.weights, self.asked, self.fails_at = "none", list[str](), ""

    def describe(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> dict[str, Any]:
        if self.fails_at in [item.name for item in items]:
            raise KeyboardInterrupt
        self.asked += [item.name for item in items]
        mean = images.mean((1, 2, 3))
        return {"mean": mean, "size": [f"{images.shape[2]}" for _ in items], "vector": images.flatten(1)[:, :4]}

    def summarise(self, items: Sequence[Item], scores: dict[str, Any]) -> dict[str, Any]:
        return {"mean": float(scores["mean"].mean()), "vectors": list(scores["vector"].shape)}


NAMES = [f"{group}/{number}" for group in "ab" for number in range(4)]


@pytest.fixture
def images(tmp_path: Path) -> torch.Tensor:
    pictures = smooth_images(8)
    save_images(tmp_path / "images", NAMES, pictures)
    return pictures


@pytest.fixture(autouse=True)
def parts_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 2)


def benchmark(per_prompt: int = 1) -> Brightness:
    return Brightness([Item(name, "", f"text of {name}", name[0]) for name in NAMES], per_prompt)


def test_a_whole_run(tmp_path: Path, images: torch.Tensor) -> None:
    """What is written, and that what is returned is what the file has."""
    found = run_benchmark(benchmark(), tmp_path / "images", tmp_path / "out")
    assert found == json.loads((tmp_path / "out/summary.json").read_text())
    assert found["figures"] == {"mean": pytest.approx(images.mean().item()), "vectors": [8, 4]}
    assert found["images"] == 8 and found["scored_by"] == {"weights": "none"} and "versions" in found["made_with"]
    lines = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == NAMES and lines[5]["text"] == "text of b/1"
    assert lines[5]["mean"] == pytest.approx(images[5].mean().item()) and lines[5]["size"] == "24"
    assert "vector" not in lines[0]
    with Image.open(tmp_path / "out/grid.png") as picture:  # a row for each group
        assert picture.size == (2 + 4 * 130, 2 + 2 * 130)


def test_nothing_is_scored_twice(tmp_path: Path, images: torch.Tensor) -> None:
    """Stopped within the third part; what is of other files, or was scored otherwise, or is damaged, is made again."""
    stopped = benchmark()
    stopped.fails_at = "b/1"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(stopped, tmp_path / "images", tmp_path / "out")
    assert stopped.asked == NAMES[:4] and not (tmp_path / "out/summary.json").exists()

    def asked(weights: str = "none") -> list[str]:
        again = benchmark()
        again.weights = weights
        found = run_benchmark(again, tmp_path / "images", tmp_path / "out")
        assert found["figures"]["vectors"] == [8, 4]
        return again.asked

    assert asked() == NAMES[4:] and asked() == []
    os.utime(tmp_path / "images/a/3.png", ns=(1, 1))
    assert asked() == ["a/2", "a/3"]
    (tmp_path / "out/scores/00000006.safetensors").write_bytes(b"half")
    assert asked() == ["b/2", "b/3"]
    assert asked("others") == NAMES and asked("others") == []


def test_several_sizes_and_several_images_of_a_prompt(tmp_path: Path) -> None:
    """Images of one size go together; diversity is that of each prompt's own images."""
    pictures = smooth_images(8)
    save_images(tmp_path, NAMES[:4], pictures[:4])
    save_images(tmp_path, NAMES[4:], smooth_images(4, 10, 12, seed=3), ".webp")
    found = run_benchmark(benchmark(2), tmp_path, tmp_path / "out")["figures"]
    lines = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert [line["size"] for line in lines] == ["24"] * 4 + ["10"] * 4
    pairs = [float((pictures[i] - pictures[i + 1]).square().mean().sqrt()) for i in (0, 2)]
    assert [line["diversity"] for line in lines[:4]] == pytest.approx([pairs[0]] * 2 + [pairs[1]] * 2)
    prompts = torch.tensor([line["diversity"] for line in lines[::2]])
    assert found["diversity"] == pytest.approx(prompts.mean().item())
    half = 1.959963984540054 * prompts.std().item() / 2
    assert found["diversity_95"] == pytest.approx([found["diversity"] - half, found["diversity"] + half])


def test_files_that_do_not_fit(tmp_path: Path, images: torch.Tensor) -> None:
    (tmp_path / "images/b/2.png").unlink()
    with pytest.raises(ValueError, match=r"images: expected 8 in .*, 1 are missing, the first b/2\.png"):
        run_benchmark(benchmark(), tmp_path / "images", tmp_path / "out")
    (tmp_path / "images/b/2.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"images: expected a readable image, got .*b/2\.jpg"):
        run_benchmark(benchmark(), tmp_path / "images", tmp_path / "out")
    save_images(tmp_path / "images", ["b/2"], images[:1])
    with pytest.raises(ValueError, match=r"expected one file of a name, got .*2\.jpg and .*2\.png"):
        run_benchmark(benchmark(), tmp_path / "images", tmp_path / "out")
    with pytest.raises(ValueError, match="images: expected a folder, got"):
        run_benchmark(benchmark(), tmp_path / "nowhere", tmp_path / "out")


def test_prompts_are_taken_of_equal_parts_and_whole() -> None:
    """Three subjects with 25 prompts of two images: of each a prompt, and not all the same."""
    items = [Item(f"{subject}/{number}", "") for subject in "abc" for number in range(50)]
    places = [item.name.split("/") for item in taken_prompts(items, 2, 3)]
    assert [subject for subject, _ in places] == list("aabbcc")
    numbers = [int(number) for _, number in places]
    assert all(number % 2 == 0 for number in numbers[::2]) and numbers[1::2] == [number + 1 for number in numbers[::2]]
    assert len(set(numbers[::2])) > 1
    for count in (1, 2, 7, 74):
        assert len({item.name for item in taken_prompts(items, 2, count)}) == 2 * count
    assert taken_prompts(items, 2, 0) == taken_prompts(items, 2, 75) == taken_prompts(items, 2, 90) == items
