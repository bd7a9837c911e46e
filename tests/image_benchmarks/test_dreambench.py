"""DreamBench on a small set, with the real architectures and random weights, held to a computation by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from PIL import Image

from fastvar.image_benchmarks import DreamBench, run_benchmark
from fastvar.image_benchmarks.dreambench import read_dreambench
from tests.helpers.pictures import make_dreambench, save_images, smooth_images

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")


def test_prompts(tmp_path: Path) -> None:
    """The two lists, the class in place of the subject, a token for the model alone."""
    items = read_dreambench(make_dreambench(tmp_path / "data"), per_prompt=2, token="sks")
    assert [item.name for item in items[:5]] == ["bowl2/00_0", "bowl2/00_1", "bowl2/01_0", "bowl2/01_1", "cat/00_0"]
    assert [item.prompt for item in items[::2]] == [
        *("a sks bowl on the moon", "a red sks bowl"),
        *("a sks cat in a hat", "a wet sks cat"),
    ]
    assert items[0].text == "a bowl on the moon" and items[-1].text == "a wet cat"
    assert [path.name for path in items[-1].references] == ["00.jpg", "01.jpg"]
    assert read_dreambench(tmp_path / "data", 1)[0].prompt == "a bowl on the moon"


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmark: data: .*prompts_and_classes\.txt"):
        read_dreambench(tmp_path, 1)
    data = make_dreambench(tmp_path / "data")
    for photograph in (data / "cat").iterdir():
        photograph.unlink()
    with pytest.raises(ValueError, match=r"data: expected photographs of cat in .*, got none"):
        read_dreambench(data, 1)
    (data / "prompts_and_classes.txt").write_text("cat,cat\n")
    with pytest.raises(ValueError, match="data: expected subjects, object and live subject prompts"):
        read_dreambench(data, 1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_by_hand(tmp_path: Path) -> None:
    """ViT-S/16 and ViT-B/32 by the libraries' own pipelines from the files; each photograph by itself."""
    from fastvar.rl.rewards import CLIPImageReward, CLIPTextReward, DINOReward

    torch.manual_seed(0)
    dino, clip_image = DINOReward(pretrained=None), CLIPImageReward(pretrained=None)
    clip_text = CLIPTextReward.__new__(CLIPTextReward)  # one network for both, as with public weights
    clip_text.__dict__ |= {**clip_image.__dict__, "template": "{}", "clip_score": False}
    data = make_dreambench(tmp_path / "data")
    benchmark = DreamBench(data, dino, clip_image, clip_text, per_prompt=1, take=3)
    names = [item.name for item in benchmark.items]
    save_images(tmp_path / "images", names, smooth_images(3, 64, 64))
    found = run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")

    configuration = timm.get_pretrained_cfg("vit_small_patch16_224.dino").to_dict()
    for_dino: Any = timm.data.create_transform(**timm.data.resolve_data_config(configuration))
    for_clip: Any = open_clip.image_transform(224, is_train=False)
    clip: Any = clip_image.clip.model

    @cache
    @torch.no_grad()
    def features(path: Path) -> dict[str, torch.Tensor]:
        picture = Image.open(path).convert("RGB")
        seen = clip.encode_image(for_clip(picture)[None])[0]
        return {"dino": dino.model(for_dino(picture)[None])[0], "clip-i": seen, "clip-t": seen}

    each: dict[str, dict[str, list[float]]] = {}
    for item in benchmark.items:
        own = features(tmp_path / "images" / f"{item.name}.png")
        goals = [features(path) for path in item.references]
        scores = each.setdefault(item.group, {"dino": [], "clip-i": [], "clip-t": []})
        for name in ("dino", "clip-i"):
            scores[name].append(fmean(cosine(own[name], goal[name]) for goal in goals))
        with torch.no_grad():
            read = clip.encode_text(open_clip.tokenize([item.text]))[0]
        scores["clip-t"].append(cosine(own["clip-t"], read))
    assert {subject: len(scores["dino"]) for subject, scores in each.items()} == {"bowl2": 2, "cat": 1}
    for name in ("dino", "clip-i", "clip-t"):
        means = [fmean(scores[name]) for scores in each.values()]
        assert found["figures"][name] == pytest.approx(fmean(means), abs=2e-3)
        assert found["figures"]["subjects"]["cat"][name] == pytest.approx(means[1], abs=2e-3)
        low, high = found["figures"][f"{name}_95"]
        assert high - low == pytest.approx(2 * 1.959963984540054 * stdev(means) / 2**0.5, abs=8e-3)
    assert found["scored_by"]["dino"]["weights"] == "timm vit_small_patch16_224, random"
    assert found["scored_by"]["clip-i"]["weights"] == "open_clip ViT-B-32-quickgelu, random"
