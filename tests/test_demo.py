"""The demo in very small: everything it promises is written, and a second call trains nothing again."""

from __future__ import annotations

import fcntl
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvar.demo import DemoConfig, rl_config, run_demo
from fastvar.evaluation import SamplingOptions
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
    for name in FILES:
        assert (config.output / name).is_file(), name
    assert saved_steps(config.output / "var") == [3]
    page = (config.output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must open offline"
    assert json.loads((config.output / "results.json").read_text())["scores"] == json.loads(
        json.dumps(results["scores"])
    )
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
    capsys.readouterr()
    # with other settings all is made anew
    run_demo(replace(config, seed=1))
    shown = capsys.readouterr().err
    for name in ("tokenizer", "var", "var-subject", "rl"):
        assert f"{config.output / name} was made with other settings, and is made anew" in shown
        settings = json.loads((config.output / name / "settings.json").read_text())
        assert settings["rl" if name == "rl" else "train"]["seed"] == 1


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
