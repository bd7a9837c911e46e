"""`fastvar evaluate --benchmark`: from a model or a folder to figures, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.cli import main
from fastvar.image_benchmarks import FID, Mask2Former
from fastvar.rl import rewards
from tests.helpers.pictures import make_cvtg, make_dreambench, save_images, smooth_images
from tests.helpers.tiny import tiny_infinity, tiny_var
from tests.image_benchmarks.conftest import inception, mask2former, tiny_clip  # noqa: F401

pytest.importorskip("open_clip")


def run(*arguments: Any) -> None:
    main(["evaluate", *map(str, arguments)])


@pytest.fixture
def small(tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:  # noqa: F811
    """Small networks in place of the published architectures; what CLIP's rewards of texts were asked for."""
    asked: list[dict[str, Any]] = []
    for name in ("CLIPImageReward", "HPSv2Reward"):
        monkeypatch.setattr(rewards, name, partial(getattr(rewards, name), model=tiny_clip))
    text = rewards.CLIPTextReward

    def small_text(**options: Any) -> Any:
        asked.append(options)
        return text(**{**options, "model": tiny_clip})

    monkeypatch.setattr(rewards, "CLIPTextReward", small_text)
    monkeypatch.setattr(rewards, "DINOReward", partial(rewards.DINOReward, model="vit_tiny_patch16_224"))
    return asked


def test_dreambench_of_an_infinity(
    tmp_path: Path, small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts with the token, a subject's photograph, four images of each prompt; then only what is missing."""
    net = tiny_infinity(text_length=40, text_encoder="characters-12", subject="block_causal")
    net.save_pretrained(tmp_path / "model")
    data = make_dreambench(tmp_path / "data")
    command = ["--benchmark", "dreambench", "--data", data, "--model", tmp_path / "model", "--token", "sks"]
    command += ["--weights", "dino=random", "clip=random", "--output", tmp_path / "out", "--device", "cpu"]
    run(*command, "--take", 2)
    assert small == [{"pretrained": None}]
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["subjects"]) == {"bowl2", "cat"}
    assert {"dino", "clip-i", "clip-t", "dino_95", "diversity", "diversity_95"} <= set(figures)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["images"] == 8 and summary["figures"] == figures
    images = sorted((tmp_path / "out/images").rglob("*.png"))
    assert [image.parent.name for image in images] == ["bowl2"] * 4 + ["cat"] * 4
    before = [image.stat().st_mtime_ns for image in images]
    run(*command, "--take", 2)
    assert json.loads(capsys.readouterr().out) == figures
    assert [image.stat().st_mtime_ns for image in images] == before
    for option, value, named in (("--grids", "1,2,4", "config"), ("--token", "xyz", "items"), ("--seed", 5, "seed")):
        with pytest.raises(SystemExit):
            run(*command, "--take", 2, option, value)
        assert f"were drawn with another {named}\n" in capsys.readouterr().err


def test_cvtg_of_a_folder(
    tmp_path: Path,
    small: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[dict[str, Any]] = []

    class FakeReader:
        def __init__(self, languages: list[str], **options: Any) -> None:
            made.append(options)

        def readtext(self, image: Any) -> list[Any]:
            return [([[0, 0], [5, 0], [5, 5], [0, 5]], "Open", 0.5)]

    monkeypatch.setitem(sys.modules, "easyocr", SimpleNamespace(Reader=FakeReader))
    data = make_cvtg(tmp_path / "data", {"CVTG/2": ["'Open' and 'shut'"]})
    save_images(tmp_path / "images", ["CVTG/2/0"], smooth_images(1))
    command = ["--benchmark", "cvtg-2k", "--data", data, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    run(*command, "--weights", "clip=random", "--reader-options", "download=true")
    figures = json.loads(capsys.readouterr().out)
    assert figures["word_accuracy"] == 0.5 and figures["regions"]["2"]["images"] == 1 and "clip_score" in figures
    assert made[0]["download_enabled"] is True
    # the template is CLIPScore's own, "A photo depicts {}"
    assert small == [{"pretrained": None, "model": "ViT-L-14-quickgelu", "clip_score": True}]
    scored_by = json.loads((tmp_path / "out/summary.json").read_text())["scored_by"]
    assert scored_by["reader"]["weights"] == "EasyOCR's for en" and scored_by["clip_score"]["range"] == "0 to 2.5"


def test_geneval_of_a_var(
    tmp_path: Path,
    small: list[dict[str, Any]],
    mask2former: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Drawn, detected and scored to the end; again, nothing is drawn or scored anew. The detector sees cups alone."""
    monkeypatch.setattr("fastvar.image_benchmarks.Mask2Former", partial(Mask2Former, sides=(64, 128)))
    tiny_var(num_classes=0, text_length=3, alphabet="abc").save_pretrained(tmp_path / "model")
    parts = {"single_object": "cup", "position": "tv remote"}
    lines = [{"tag": tag, "prompt": "ab", "include": [{"class": it, "count": 1}]} for tag, it in parts.items()]
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = ["--benchmark", "geneval", "--data", tmp_path / "metadata.jsonl", "--model", tmp_path / "model"]
    command += ["--weights", "clip=random", f"detector={mask2former}", "--output", tmp_path / "out", "--per-prompt", 2]
    run(*command)
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 4 and figures["overall"] == 0.5
    assert {task: each["correct"] for task, each in figures["tasks"].items()} == {"single_object": 1, "position": 0}
    assert (tmp_path / "out/images/00001/samples/0001.png").is_file() and (tmp_path / "out/grid.png").is_file()
    assert '"wrong": "expected 1 tv remote, found 0"' in (tmp_path / "out/items.jsonl").read_text()
    assert small == [{"pretrained": None, "model": "ViT-L-14-quickgelu"}]
    monkeypatch.setattr(Mask2Former, "__call__", None)
    run(*command)
    assert json.loads(capsys.readouterr().out) == figures


def test_hps_of_a_var(tmp_path: Path, small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_var(num_classes=0, text_length=3, alphabet="abc").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photo.txt").write_text("ab\nc\n")
    command = ["--benchmark", "hps", "--data", tmp_path / "data", "--model", tmp_path / "model", "--per-prompt", 2]
    run(*command, "--weights", "hpsv2=random", "--output", tmp_path / "out", "--batch-size", 3)
    assert json.loads(capsys.readouterr().out)["categories"]["photo"]["images"] == 4
    assert (tmp_path / "out/images/photo/00001_1.png").is_file()
    with pytest.raises(SystemExit):
        run(*command, "--weights", "hpsv2=random", "--output", tmp_path / "out", "--grids", "1,2")
    assert "grids: expected none with a VAR" in capsys.readouterr().err


def test_rewards_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_var().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sketch.txt").write_text("3\ta sketch\n0\tanother\n")
    command = ["--benchmark", "prompts", "--data", tmp_path / "data", "--model", tmp_path / "model"]
    run(*command, "--rewards", "colour", "--held-out", "jpeg", "--output", tmp_path / "out")
    figures = json.loads(capsys.readouterr().out)
    assert figures["categories"]["sketch"]["images"] == 2
    assert {"colour", "held_out/jpeg", "held_out/jpeg_95"} <= set(figures)


def test_fid_of_classes(
    tmp_path: Path,
    inception: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So many images, each class as often; scored again as a folder they have the same distance."""
    made: list[Any] = []

    def fid(*arguments: Any, **options: Any) -> Any:
        made.append((arguments, options))
        return FID(*arguments, **options, features="64")  # the root of a matrix of 2048 takes seconds

    monkeypatch.setattr("fastvar.image_benchmarks.FID", fid)
    tiny_var().save_pretrained(tmp_path / "model")
    save_images(tmp_path / "real", "abc", smooth_images(3))
    command = ["--benchmark", "fid", "--data", tmp_path / "real", "--weights", f"inception={inception}"]
    command += ["--device", "cpu", "--output"]
    run(*command, tmp_path / "out", "--model", tmp_path / "model", "--samples", 8)
    figures = json.loads(capsys.readouterr().out)
    assert figures["reference_images"] == 3 and figures["fid"] > 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["images"] == 8 and f"layer 64, {inception} (" in summary["scored_by"]["weights"]
    run(*command, tmp_path / "again", "--images", tmp_path / "out/images")
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(figures["fid"], rel=1e-3)
    (items, data, kept), options = made[0]
    assert [item.prompt for item in items] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert (data, kept) == (tmp_path / "real", tmp_path / "out/reference")
    assert options == {"weights": inception, "device": torch.device("cpu")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--benchmark", "coco"],
            "benchmark: expected one of ('', 'dreambench', 'cvtg-2k', 'geneval', 'hps', 'prompts', 'fid')",
        ),
        (["--benchmark", "hps", "--model", "x"], "evaluate: data: expected the data of hps, got none"),
        (["--benchmark", "hps", "--data", "."], "evaluate: model, images: expected exactly one of them"),
        (
            ["--benchmark", "hps", "--data", ".", "--images", "."],
            "evaluate: output: expected a folder for hps, got none",
        ),
        (["--benchmark", "cvtg-2k", "--data", ".", "--reader", "eyes"], "evaluate: reader: expected one of ('easyocr'"),
        (["--benchmark", "hps", "--data", ".", "--weights", "hps=x"], "evaluate: weights: expected NAME=TAG with NAME"),
        (["--benchmark", "fid", "--data", ".", "--take", "2"], "evaluate: take: expected 0 for fid, got 2"),
        (["--benchmark", "hps", "--data", ".", "--token", "sks"], "evaluate: token: expected '' for hps, got 'sks'"),
        (
            ["--benchmark", "prompts", "--data", ".", "--reader", "handwriting"],
            "evaluate: reader: expected 'easyocr' for prompts, got 'handwriting': it is not read there",
        ),
        (
            ["--benchmark", "hps", "--data", ".", "--images", ".", "--output", "out", "--rewards", "jpeg"],
            "evaluate: rewards: expected ('ocr',) for hps, got ('jpeg',): it is not read there",
        ),
        (
            ["--benchmark", "prompts", "--data", ".", "--weights", "clip=openai"],
            "evaluate: weights: expected none for prompts, got 'clip=openai'",
        ),
        (
            ["--benchmark", "fid", "--data", ".", "--weights", "inception=random"],
            "evaluate: weights: expected a file of Inception's weights, got 'inception=random'",
        ),
        (
            ["--benchmark", "geneval", "--data", ".", "--weights", "detector=random"],
            "evaluate: weights: expected a folder of a Mask2Former, got 'detector=random'",
        ),
        (["--take", "3"], "evaluate: take: expected 0 without a benchmark, got 3"),
        (
            ["--benchmark", "hps", "--data", ".", "--images", ".", "--output", "out"],
            "evaluate: weights: expected hpsv2=PATH for hps, got none",
        ),
        ([], "evaluate: model: expected a folder, got none"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(*arguments)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
