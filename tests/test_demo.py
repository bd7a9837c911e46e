"""The demo in very small: everything it promises is written, and a second call trains nothing again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.demo import DemoConfig, run_demo
from fastvar.training.checkpoints import saved_steps

FILES = ("report.html", "results.json", "tokenizer/model/model.safetensors", "var/model/tokenizer/config.json")


def test_demo(tmp_path: Path) -> None:
    config = DemoConfig(
        output=tmp_path / "demo",
        tokenizer_steps=3,
        var_steps=3,
        subject_steps=3,
        scenes=64,
        samples=12,
        width=32,
        depth=1,
    )
    results = run_demo(config)
    for name in FILES:
        assert (config.output / name).is_file(), name
    assert saved_steps(config.output / "var") == [3]
    page = (config.output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must open offline"
    assert json.loads((config.output / "results.json").read_text())["scores"] == json.loads(
        json.dumps(results["scores"])
    )
    assert {"tokenizer", "var", "var-subject", "evaluation"} <= set(results["seconds"])
    before = {
        name: (config.output / name / "metrics.jsonl").read_text() for name in ("tokenizer", "var", "var-subject")
    }
    again = run_demo(config)
    assert again["scores"] == results["scores"]
    for name, lines in before.items():  # with their seconds: nothing was trained again
        assert (config.output / name / "metrics.jsonl").read_text() == lines
    with pytest.raises(ValueError, match=r"other settings \(train.seed was 0, is 1"):
        run_demo(replace(config, seed=1))
