"""The page about integrations is true: its blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastvar.integrations import PARTS, shims
from tests.helpers.public_var import PublicVAR

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def test_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = {"var": PublicVAR().eval(), "labels": torch.tensor([1, 4]), "inputs": torch.randn(2, 29, 4)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    try:
        for number, text in enumerate(blocks):
            exec(compile(text.replace("top_k=900", "top_k=9"), f"block {number}", "exec"), names)
    finally:
        shims.uninstall()
    assert "replaced: attention: 2 x Attention" in capsys.readouterr().out
    assert not any("_fastvar" in vars(module) for module in names["var"].modules())


def test_all_parts_are_there() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == PARTS
