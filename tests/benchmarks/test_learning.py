"""The parts of a gradient, and the document made of their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import learning, records
from fastvar.models import SamplingOptions
from fastvar.ops import PolicyLossOptions
from fastvar.rl import Prompts, roll_out, segment_loss
from tests.helpers.tiny import tiny_var


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_parts_add_up(alpha: float) -> None:
    var = tiny_var()
    drawn = roll_out(var, Prompts(["0", "1"], torch.tensor([0, 1])), group_size=3, seed=0, options=SamplingOptions())
    advantages = torch.tensor([1.0, -2.0, 1.0, 0.5, 0.5, -1.0])
    options = PolicyLossOptions(panw_alpha=alpha)
    found = learning.by_scale(var, drawn, advantages, options)
    scales = len(var.schedule)
    assert found.shape == (scales, scales + 2)
    norms, cosines = found[:, 0], found[:, 2:]
    squared = norms @ cosines @ norms  # of the sum of all parts
    loss = segment_loss(var, drawn, advantages, options).loss
    whole = torch.autograd.grad(loss, [p for p in var.parameters() if p.requires_grad], allow_unused=True)
    expected = sum(g.double().square().sum() for g in whole if g is not None)
    torch.testing.assert_close(squared, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[:, 1], (cosines @ norms) / expected.sqrt(), rtol=1e-4, atol=1e-6)


def test_document(tmp_path: Path) -> None:
    run = {"benchmark": "run", "name": "a", "settings": {}, "metrics": {"reward": [[1, 0.5], [2, 0.75]]}}
    row = {"benchmark": "gradients", "reward": "ocr", "panw_alpha": 0.6, "norms": [2.0, 0.5]}
    for record in (run, row | {"cosine_with_all": [0.5, 0.25]}):
        records.append(tmp_path / "rows.jsonl", record)
    (tmp_path / "a.md").write_text("before\n<!-- gradients -->\nold\n<!-- end of gradients -->\n")
    learning.docs(tmp_path / "rows.jsonl", tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text()
    assert "| ocr | 0.6 | 2, 0.5 | 4.0 | 0.50, 0.25 |\n<!-- end" in text and "old" not in text
    for name in ("tokens", "norms", "runs"):
        assert Image.open(tmp_path / f"learning_{name}.png").width > 100


def test_what_is_published() -> None:
    """The document's table is that of the recorded rows."""
    rows = records.read(learning.DATA)
    measured = {(row["reward"], row["panw_alpha"]): row for row in rows if row["benchmark"] == "gradients"}
    assert learning.table(measured) in learning.DOCUMENT.read_text()
    assert any(row["benchmark"] == "run" and row["settings"] for row in rows)
