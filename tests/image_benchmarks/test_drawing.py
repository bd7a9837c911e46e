"""Images of a benchmark from a model: which, in what order, and that none is drawn twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.data.pairs import read_references
from fastvar.image_benchmarks import Item, class_items, draw_items
from fastvar.image_benchmarks import drawing as module
from fastvar.image_benchmarks.items import read_image
from fastvar.models import SamplingOptions
from fastvar.pictures import to_uint8
from tests.helpers.pictures import save_images, smooth_images
from tests.helpers.tiny import tiny_var

OPTIONS = SamplingOptions(batch_size=2, top_k=4)


def saved(folder: Path, names: list[str]) -> torch.Tensor:
    return torch.stack([read_image(folder / f"{name}.png") for name in names])


def test_images_of_classes(tmp_path: Path) -> None:
    """As the model draws them in one batch, whatever the batches and what was there."""
    var, items = tiny_var(), class_items(5, 5)
    labels = torch.tensor([item.prompt for item in items])
    expected = torch.from_numpy(to_uint8(var.generate(labels, seed=3, top_k=4).images)).permute(0, 3, 1, 2) / 255
    draw_items(var, items, tmp_path, OPTIONS, seed=3)
    names = [item.name for item in items]
    assert torch.equal(saved(tmp_path, names), expected)
    (tmp_path / "000003.png").unlink()
    before = (tmp_path / "000000.png").stat().st_mtime_ns
    draw_items(var, items, tmp_path, SamplingOptions(batch_size=2, top_k=4), seed=3)
    assert torch.equal(saved(tmp_path, names), expected)
    assert (tmp_path / "000000.png").stat().st_mtime_ns == before


def test_a_folder_of_other_images(tmp_path: Path) -> None:
    var, items = tiny_var(), class_items(5, 2)
    draw_items(var, items, tmp_path, OPTIONS)
    with pytest.raises(ValueError, match=r"expected another folder, as the images in .* with another seed"):
        draw_items(var, items, tmp_path, OPTIONS, seed=1)
    with pytest.raises(ValueError, match="with another top_p"):
        draw_items(var, items, tmp_path, SamplingOptions(top_k=4, top_p=0.5))
    with torch.no_grad():
        var.head.weight[0] += 1
    with pytest.raises(ValueError, match="with another model"):
        draw_items(var, items, tmp_path, OPTIONS)


def test_texts_and_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt goes to the model, and the first photograph as its subject."""
    var = tiny_var(subject="block_causal", num_classes=0, text_length=2, alphabet="ab")
    save_images(tmp_path, ["photo"], smooth_images(1, 16, 48))
    items = [Item(name, name, references=(tmp_path / "photo.png", tmp_path / "none.png")) for name in ("a", "ab", "b")]
    calls: list[Any] = []

    def draw(model: Any, prompts: Any, options: Any, **rest: Any) -> torch.Tensor:
        calls.append((prompts, rest["first_sample"], rest["subject"]))
        return torch.zeros(len(prompts), 3, 4, 4)

    monkeypatch.setattr(module, "draw", draw)
    draw_items(var, items, tmp_path / "images", OPTIONS)
    assert [call[:2] for call in calls] == [(["a", "ab"], 0), (["b"], 2)]
    # as in training: resized until it covers the model's size, its centre cut out
    photograph = read_references([tmp_path / "photo.png"], var.tokenizer.config.image_size, "test")
    expected = var.pyramid(var.tokenizer.encode(photograph))
    torch.testing.assert_close(calls[0][2], expected.expand(2, -1, -1))
    torch.testing.assert_close(calls[1][2], expected)
    with pytest.raises(ValueError, match="model: expected one without a subject prefix, as there are no photographs"):
        draw_items(var, [Item("a", "a")], tmp_path / "others", OPTIONS)
    with pytest.raises(ValueError, match="model: expected one of classes, got one of texts"):
        draw_items(var, class_items(2, 2), tmp_path / "others", OPTIONS)


def test_classes_by_name(tmp_path: Path) -> None:
    var = tiny_var(class_names=("cat", "dog", "7", "cup", "car"))
    draw_items(var, [Item("a", "dog"), Item("b", "4"), Item("c", "7")], tmp_path, OPTIONS)
    expected = var.generate(torch.tensor([1, 4, 2]), top_k=4).images
    assert expected is not None
    found = saved(tmp_path, ["a", "b", "c"])
    torch.testing.assert_close(found, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"^benchmark: data: .*got 'cow'"):
        draw_items(var, [Item("a", "cow")], tmp_path / "others", OPTIONS)
