"""The README is true: its Python blocks run, its support matrix is the program's, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden.golden import load_case
from PIL import Image

import fastvar

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs alone, in a folder with small stand-ins for the checkpoint files and the photos it names."""
    monkeypatch.chdir(tmp_path)
    case = load_case("var_tiny")
    torch.save(case.transformer, "var_d16.pth")
    torch.save(case.tokenizer, "vae_ch160v4096z32.pth")
    for label in ("cats", "dogs"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (48, 40), (40 * i, 90, 120)).save(tmp_path / "photos" / label / f"{i}.png")
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 4


def test_support_matrix_is_current() -> None:
    start, end = "<!-- support matrix: fastvar info --markdown -->\n", "<!-- end of support matrix -->"
    shown = README.split(start)[1].split(end)[0]
    assert shown.strip() == fastvar.support().markdown().strip()


def test_environment_variables_are_listed() -> None:
    used = set()
    for folder in ("fastvar", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"FASTVAR_[A-Z_]+", path.read_text()))
    assert used == set(re.findall(r"`(FASTVAR_[A-Z_]+)`", README))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
