"""CVTG-2K: words as multisets, by hand; readings through the readers' protocol."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.data.metrics import ratio_interval
from fastvar.image_benchmarks import CVTG2K, count_words, run_benchmark
from fastvar.image_benchmarks.cvtg import items_of, words_of
from tests.helpers.pictures import make_cvtg, save_images, smooth_images

PROMPTS = {
    "CVTG/2": ["a sign with 'Open Now' and a door with 'Push'", "'Now' beside 'now'"],
    "CVTG-Style/3": ["'Red' in red, 'Blue' in blue, and 'green tea' below"],
}
READ = [["push", "OPEN", "closed"], ["now"], ["Rad", "blue", "green", "green"]]


class Reader:
    """Reads what it is told, an image after the other."""

    def __init__(self) -> None:
        self.readings = iter(READ)

    def __call__(self, images: torch.Tensor) -> list[Any]:
        return [SimpleNamespace(words=next(self.readings)) for _ in images]


def clip_score(images: torch.Tensor, prompts: list[str]) -> Any:
    return SimpleNamespace(scores=torch.tensor([len(prompt) / 100 for prompt in prompts]))


clip_score.description = SimpleNamespace(_asdict=lambda: {"weights": "none"})  # type: ignore[attr-defined]


def test_words() -> None:
    assert words_of("a 'Two words' and \"none\" and 'one'") == ["Two", "words", "one"]
    assert words_of("it's a 'trap'") == ["s", "a"]  # as published
    assert count_words(["Now", "now", "open"], ["NOW", "opan", "x"]) == (3, 1, 2, pytest.approx(1 + 1 + 3 / 4))
    assert count_words(["a"], []) == (1, 0, 0, 0.0)
    # difflib finds "ba" as close to "ab" as "ax" is, and takes the last in the alphabet: 1 of 2 letters would be right
    assert count_words(["ab"], ["ba", "ax"]) == (1, 0, 0, 0.0)


def test_by_hand(tmp_path: Path) -> None:
    data = make_cvtg(tmp_path / "data", PROMPTS)
    benchmark = CVTG2K(data, Reader(), clip_score)  # type: ignore[arg-type]
    names = [item.name for item in benchmark.items]
    assert names == ["CVTG/2/0", "CVTG/2/1", "CVTG-Style/3/0"]
    save_images(tmp_path / "images", names, smooth_images(3))
    found = run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")["figures"]
    # "open" and "push" were read; difflib takes "open" for "now" and "rad" for "tea", which share no place of a letter
    words, right, present = [3, 2, 4], [2, 1, 2], [2, 2, 2]
    similar = [2.0, 2.0, 2 / 3 + 1 + 1]  # rad for red
    assert found["word_accuracy"] == pytest.approx(5 / 9) and found["images"] == 3
    low, high = ratio_interval(right, words)
    assert found["word_accuracy_95"] == pytest.approx((low, min(high, 1)))
    assert found["word_accuracy_published"] == pytest.approx(sum(present) / 9)
    low, high = ratio_interval(present, words)
    assert found["word_accuracy_published_95"] == pytest.approx((low, min(high, 1)))
    assert found["ned"] == pytest.approx(sum(similar) / 9, abs=1e-6)
    assert found["clip_score"] == pytest.approx(sum(len(item.text) for item in benchmark.items) / 300)
    assert found["regions"]["2"]["word_accuracy"] == pytest.approx(3 / 5)
    assert found["regions"]["3"]["word_accuracy"] == 0.5 and found["regions"]["3"]["word_accuracy_95"] is None
    assert found["sets"]["CVTG"]["images"] == 2 and found["sets"]["CVTG-Style"]["ned"] == pytest.approx(similar[2] / 4)
    assert '"read": "push OPEN closed"' in (tmp_path / "out/items.jsonl").read_text()


def test_another_folder(tmp_path: Path) -> None:
    nothing = r"data: expected prompts, the folders CVTG and CVTG-Style with 2\.json to 5\.json in .*, got none"
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=nothing):
            items_of(folder)
    (tmp_path / "CVTG").mkdir()
    for content in ({"data_list": [{"index": "../../x", "prompt": "'a'"}]}, {"data_list": [{"index": 1}]}):
        (tmp_path / "CVTG/4.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"data: expected prompts by index, .* got .*4\.json"):
            items_of(tmp_path)
    make_cvtg(tmp_path, {"CVTG/4": ["no quotes"]})
    with pytest.raises(ValueError, match=r"data: expected words in single quotes, got 'no quotes' of CVTG/4/0"):
        items_of(tmp_path)
