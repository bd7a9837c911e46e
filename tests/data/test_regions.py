"""Items by regions of text: filtered, and drawn to a target."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvar.data import TextImages, draw_by_regions
from fastvar.data.regions import TARGET, largest_draw, region_bins, with_regions

REGIONS = np.random.default_rng(0).integers(0, 9, 400).tolist()


def test_bins() -> None:
    bins = region_bins([3, 1, 7, 3, 6, 0])
    assert bins == {0: [5], 1: [1], 3: [0, 3], 6: [2, 4]}
    assert with_regions([3, 1, 7, 3, 6, 0], [3, 6]) == [0, 2, 3, 4]


def test_drawn_to_the_target() -> None:
    chosen = draw_by_regions(REGIONS, 60, seed=1)
    assert Counter(REGIONS[i] for i in chosen) == {2: 12, 3: 18, 4: 18, 5: 12}
    assert chosen == sorted(set(chosen)) == draw_by_regions(REGIONS, 60, seed=1) != draw_by_regions(REGIONS, 60, seed=2)
    assert set(draw_by_regions(REGIONS, 20, seed=1)) < set(chosen)  # the same order of a bin for any size
    only = draw_by_regions(REGIONS, 5, shares={6: 1.0})
    assert all(REGIONS[i] >= 6 for i in only)


def test_as_many_as_there_can_be() -> None:
    size = largest_draw(REGIONS)
    assert len(draw_by_regions(REGIONS)) == size
    with pytest.raises(ValueError, match=r"expected at least \d+ items with [2-5] regions, got"):
        draw_by_regions(REGIONS, size + 1)
    assert largest_draw([2, 3, 4]) == 0  # none of five
    with pytest.raises(ValueError, match="expected at least 1 items with 5 regions, got 0"):
        draw_by_regions([2, 3, 4])
    with pytest.raises(ValueError, match="items with 6 regions or more, got 0"):
        draw_by_regions([2, 3], 1, shares={6: 1})
    assert sum(TARGET.values()) == pytest.approx(1)


def test_images_of_some_regions(tmp_path: Path) -> None:
    """By the boxes of a list, or by what is quoted in the text."""
    lines = []
    for number, (text, boxes) in enumerate([('"a"', None), ('"a" "b"', None), ("c", [[0, 0, 1, 1]] * 3), ("d", [])]):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "text": text} | ({} if boxes is None else {"boxes": boxes}))
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    every = TextImages(tmp_path / "all.jsonl", sizes=[(8, 8)])
    assert [item.regions for item in every.items] == [1, 2, 3, 0]
    assert TextImages(tmp_path / "all.jsonl", sizes=[(8, 8)], regions=[2, 3]).texts == ['"a" "b"', "c"]
