"""The demo in very small: everything it promises is written, and a second call repeats nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    again = run_demo(config)
    assert again["scores"] == results["scores"]
