"""Targets with references of their subjects: lists and folders, what is drawn, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvar.data import SubjectPairs
from fastvar.data.pairs import find_pairs, is_pairs, read_references
from fastvar.training.batches import seeded


def picture(path: Path, colour: int, width: int = 8, height: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (colour, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subjects with one and two references, two and one targets."""
    root = tmp_path / "subjects"
    picture(root / "cat/references/a.png", 10)
    for number in (1, 2):
        picture(root / f"cat/{number}.png", 100 + number)
        (root / f"cat/{number}.txt").write_text(f"a cat, {number}")
        picture(root / f"dog/references/{number}.png", 20 * number)
    picture(root / "dog/x.png", 200, height=16)
    (root / "dog/x.txt").write_text(" a dog ")
    return root


def test_folders_and_lists(folder: Path) -> None:
    found = find_pairs(folder)
    assert [pair.text for pair in found] == ["a cat, 1", "a cat, 2", "a dog"]
    assert [len(pair.references) for pair in found] == [1, 1, 2]
    entries = [
        {"image": f"subjects/{pair.image.relative_to(folder)}", "text": pair.text}
        | {"references": [f"subjects/{path.relative_to(folder)}" for path in pair.references]}
        for pair in found
    ]
    path = folder.parent / "pairs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    assert find_pairs(path) == [pair._replace(image=folder.parent / pair.image) for pair in found]
    assert is_pairs(folder) and is_pairs(path) and not is_pairs(folder / "cat") and not is_pairs("handwriting")
    path.write_text(json.dumps({"image": "a.png", "text": "b"}))
    assert not is_pairs(path)


def test_items(folder: Path) -> None:
    """Targets and references of one size; each reference of a subject comes, as the random state says."""
    pairs = SubjectPairs(folder, sizes=[(4, 4), (8, 4)])
    assert len(pairs) == 3 and pairs.buckets == [0, 0, 1] and pairs.text_length == 8
    assert pairs.alphabet == "".join(sorted(set("a cat, 1 2dog")))
    item = pairs[2]
    assert item["text"] == "a dog" and item["image"].shape == item["reference"].shape == (3, 8, 4)
    seen = []
    for position in range(12):
        with seeded(0, position):
            seen.append(round(float((pairs[2]["reference"][0, 0, 0] + 1) * 127.5)))
    assert set(seen) == {20, 40}
    with seeded(0, 3):
        assert round(float((pairs[2]["reference"][0, 0, 0] + 1) * 127.5)) == seen[3]


def test_what_is_not_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cat/1.txt").unlink()
    picture(folder / "bird/a.png", 1)
    (folder / "bird/a.txt").write_text("a bird")
    with pytest.raises(ValueError, match=r"got 2 others: .*a\.png: no references; .*1\.png: 1\.txt is missing"):
        find_pairs(folder)
    assert [pair.text for pair in find_pairs(folder, skip_bad=True)] == ["a cat, 2", "a dog"]
    for name in ("bird/a.png", "cat/1.png"):
        (folder / name).unlink()
    (folder / "dog/references/2.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="no readable image or reference"):
        SubjectPairs(folder, sizes=[(4, 4)])
    assert len(SubjectPairs(folder, sizes=[(4, 4)], skip_bad=True)) == 1
    lines = folder.parent / "pairs.jsonl"
    lines.write_text('{"image": "a.png", "text": "b", "references": []}\n{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r'line 1: no references; .*line 2: no object with "image"'):
        find_pairs(lines)
    for nothing in (folder / "cat/references", folder / "nowhere"):
        with pytest.raises(ValueError, match="SubjectPairs: source: expected"):
            find_pairs(nothing)


def test_references_as_models_take_them(tmp_path: Path) -> None:
    picture(tmp_path / "wide.png", 255, width=12, height=6)
    picture(tmp_path / "square.png", 0)
    photos = read_references([tmp_path / "wide.png", tmp_path / "square.png"], (4, 6), "here")
    assert photos.shape == (2, 3, 4, 6) and photos.dtype == torch.float32
    assert photos[0, 0].unique().tolist() == [1.0] and photos[1].unique().tolist() == [-1.0]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"here: expected a readable image, got .*text\.png"):
        read_references([tmp_path / "text.png"], (4, 6), "here")
    with pytest.raises(ValueError, match="here: expected at least one photo"):
        read_references([], (4, 6), "here")
