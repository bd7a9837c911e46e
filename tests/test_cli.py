"""The command line: help, one clear line for a mistake, and all commands once in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fastvar.cli import main

COMMANDS = ("train-tokenizer", "train", "sample", "evaluate", "demo", "info")
SMALL = ["--grids", "1,2x2,3x4", "--vocab-size", "16", "--code-channels", "8", "--channels", "8", "--norm-groups", "4"]
FEW = ["--steps", "3", "--batch-size", "4", "--scenes", "16", "--log-every", "1"]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: fastvar" in shown
    undocumented = [line for line in shown.splitlines() if line.strip(" │").startswith("(default:") and "--" in line]
    assert undocumented == []


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    shown = capsys.readouterr().out
    assert "torch" in shown and "block_causal_attention" in shown
    run("info", "--markdown")
    assert capsys.readouterr().out.startswith("| operator |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "nowhere", "--labels", "1"], "model: expected a folder with config.json, got nowhere"),
        (["train-tokenizer", "--output", "x", "--grids", "4,2"], "expected sides that never shrink"),
        (["train-tokenizer", "--output", "x", "--grids", "four"], "expected a preset or grids"),
        (["train-tokenizer", "--output", "x", "--data", "nowhere"], "nowhere"),
        (["train", "--output", "x", "--tokenizer", "nowhere"], "tokenizer: expected a folder with config.json"),
        (["train-tokenizer", "--output", "x", "--steps", "0"], "steps: expected at least 1, got 0"),
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
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_train_sample_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *FEW)
    shape = ["--depth", "1", "--width", "16", "--heads", "2"]
    run("train", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq/model", *shape, *FEW, "--cache-tokens")
    run(
        "sample",
        "--model",
        tmp_path / "var/model",
        "--labels",
        "07",
        "42",
        "--count",
        "3",
        "--output",
        tmp_path / "a.png",
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 + 3 * (16 + 2), 2 + 2 * (12 + 2))
    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "var/model", "--samples", "6", "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(capsys.readouterr().out) == figures and figures["reading"]["images"] == 6
    run(
        *["train", "--output", tmp_path / "subject", "--tokenizer", tmp_path / "vq/model", *FEW],
        *["--start", tmp_path / "var/model", "--subject", "bidirectional"],
    )
    run("evaluate", "--model", tmp_path / "subject/model", "--samples", "6")
    assert "subject_match" in capsys.readouterr().out
    run(
        *["sample", "--model", tmp_path / "subject/model", "--labels", "07", "--subject", tmp_path / "a.png"],
        *["--output", tmp_path / "b.png"],
    )
    assert (tmp_path / "b.png").is_file()
    with pytest.raises(SystemExit):
        run("sample", "--model", tmp_path / "var/model", "--labels", "cat", "--output", tmp_path / "c.png")
    assert "expected texts of at most 2 characters out of '0123456789', got 'cat'" in capsys.readouterr().err


def test_folder_of_images(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 30), (60 * i, 10, 200)).save(tmp_path / "photos" / label / f"{i}.png")
    few = ["--steps", "2", "--batch-size", "4"]
    run("train-tokenizer", "--data", tmp_path / "photos", "--output", tmp_path / "vq", *SMALL, *few)
    run(
        "train", "--data", tmp_path / "photos", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq/model", *few
    )
    run("sample", "--model", tmp_path / "var/model", "--labels", "1", "--output", tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
