"""The demo in very small: everything it promises is written, and a second call trains nothing again."""

from __future__ import annotations

import fcntl
import html
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvar.cli import main
from fastvar.evaluation import ReadingScore
from fastvar.handwriting.demo import DemoConfig, Stages, rl_config, run_demo
from fastvar.handwriting.report import headline, reading_labels
from fastvar.models import SamplingOptions
from fastvar.report import Report
from fastvar.training.checkpoints import saved_steps
from fastvar.training.loop import resolve_precision

FILES = ("report.html", "results.json", "tokenizer/model/model.safetensors", "var/model/tokenizer/config.json")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DemoConfig(
        output=tmp_path / "demo",
        tokenizer_steps=3,
        var_steps=3,
        subject_steps=3,
        scenes=64,
        samples=12,
        rl_iterations=1,
        width=32,
        depth=1,
    )
    results = run_demo(config)
    told = capsys.readouterr()
    stages = re.findall(r"^fastvar: stage (\d) of 7: .*; less than a minute left of all stages$", told.err, re.M)
    assert stages == list("1234567") and len(told.err.splitlines()) == 7, "no terminal, no progress bars"
    for name in FILES:
        assert (config.output / name).is_file(), name
    assert saved_steps(config.output / "var") == [3]
    page = (config.output / "report.html").read_text()
    plots, guided, pairs = 3, 12, (6, 12, 12)
    assert page.count("data:image/png;base64,") == plots + guided + 2 * sum(pairs)
    assert page.index("before and after") < page.index("What the reader makes")
    for name, figure in headline(results):
        assert f"<td>{name}</td><td>{figure}</td>" in page
    for text in ("Read exactly:", "NED:", *(f"<td>{name}</td>" for name in results["provenance"])):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must open offline"
    assert json.loads((config.output / "results.json").read_text())["scores"] == json.loads(
        json.dumps(results["scores"])
    )
    assert {"command", "date", "hardware", "versions"} <= set(results["provenance"])
    assert {"tokenizer", "var", "var-subject", "rl", "evaluation"} <= set(results["seconds"])
    before = {
        name: (config.output / name / "metrics.jsonl").read_text() for name in ("tokenizer", "var", "var-subject")
    }
    again = run_demo(config)
    assert again["scores"] == results["scores"]
    for name, lines in before.items():  # with their seconds: nothing was trained again
        assert (config.output / name / "metrics.jsonl").read_text() == lines
    # what "auto" came to is kept: a run does not go on in another precision
    settings = json.loads((config.output / "tokenizer" / "settings.json").read_text())
    precision = resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert settings["train"]["precision"] == precision
    next_commands(page)
    capsys.readouterr()
    # with other settings all is made anew
    run_demo(replace(config, seed=1))
    shown = capsys.readouterr().err
    for name in ("tokenizer", "var", "var-subject", "rl"):
        assert f"{config.output / name} was made with other settings, and is made anew" in shown
        settings = json.loads((config.output / name / "settings.json").read_text())
        assert settings["rl" if name == "rl" else "train"]["seed"] == 1


def next_commands(page: str) -> None:
    """What the report tells to run next runs."""
    lines = html.unescape(re.findall("<pre>(.*?)</pre>", page, re.S)[0]).splitlines()
    few = {"sample": ["--count", "1"], "evaluate": ["--samples", "8"], "rl": ["--iterations", "1", "--prompts", "1"]}
    assert [line.split()[1] for line in lines] == ["sample", "sample", "evaluate", "rl"]
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "fastvar"
        main([command, *arguments, *few[command]])


def test_wrong_readings_are_marked(tmp_path: Path) -> None:
    score = ReadingScore(torch.zeros(3, 3, 2, 2), ["07", "42", "13"], ["07", "47", ""], 0, (0, 0), 0, (0, 0))
    labels = reading_labels(score)
    assert labels == [("07", False), ("42, read 47", True), ("13, read nothing", True)]
    report = Report("title")
    report.gallery([[(Image.new("RGB", (2, 2)), *label) for label in labels]])
    report.write(tmp_path / "report.html")
    shown = re.findall("<figcaption(.*?)>(.*?)<", (tmp_path / "report.html").read_text())
    assert shown == [("", "07"), (' class="wrong"', "42, read 47"), (' class="wrong"', "13, read nothing")]


def test_the_time_that_is_left_follows_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """Half as fast as the recorded run until now: twice its time for the rest. Without rewards it is a stage less."""
    stages = Stages(DemoConfig(rl_iterations=0))
    stages.begin("reader", {})
    stages.begin("var", {"reader": 6.0, "tokenizer": 180.0, "tokens": 20.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "stage 1 of 6: fitting the reader of digits; about 7 minutes left of all stages" in first
    assert "stage 4 of 6: training the VAR, 2000 steps; about 10 minutes left of all stages" in second


def test_five_figures() -> None:
    """Of the recorded form, with and without rewards."""
    rate = {"word_accuracy": 0.42, "word_accuracy_95": [0.4, 0.44]}
    names = ("samples, guided", "samples, no guidance", "samples, no guidance, after rewards")
    match = {"shape": 0.46, "shape_95": [0.4, 0.5], "ink": 0.6, "ink_95": [0.5, 0.7]}
    results = {"scores": dict.fromkeys(names, rate), "subject_match": match}
    assert headline(results)[-1] == ("read exactly without guidance", "42.0 % (40.0 to 44.0)")
    found = headline({**results, "rl": {"iterations": 3, "diversity_kept": 0.964}})
    assert len(found) == 5 and found[-1] == ("diversity kept by VMR-GRPO", "96 %")
    assert found[1] == (
        "samples with a subject: shape nearest to its own reference among eight",
        "46.0 % (40.0 to 50.0)",
    )


def test_sizes_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VARConfig: num_heads: expected a divisor of embed_dim 100, got 3"):
        run_demo(DemoConfig(output=tmp_path / "demo", width=100))
    with pytest.raises(ValueError, match="SamplingOptions: guidance: expected"):
        run_demo(DemoConfig(output=tmp_path / "demo", sampling=SamplingOptions(guidance=math.nan)))
    assert not (tmp_path / "demo").exists()
    assert [rl_config(DemoConfig(grids=grids)).middle for grids in ("6x8", "1,6x8", "1,2,3,6x8")] == [0, 1, 2]


def test_a_folder_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*arguments: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(ValueError, match=r"output: .* is in use by another process"):
        run_demo(DemoConfig(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "no"), (None, None, "no")],
)
def test_precision_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, avx512: bool | None, amx: bool | None, expected: str
) -> None:
    """None: a version of torch that cannot say what the CPU has."""
    for name, value in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if value is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    device = torch.device("cpu")
    assert resolve_precision("auto", device) == expected
    assert [resolve_precision(given, device) for given in ("no", "bf16")] == ["no", "bf16"]
