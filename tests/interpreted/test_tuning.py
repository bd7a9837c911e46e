"""`fastvar tune` reaches every table that has something to try, through the kernels that ask it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastvar.kernels.common.tiling import SHARED, Card, own_tiles

from fastvar.tuning import Tuner, load_tables
from fastvar.workloads import Shape, tensors, workloads

CPU = torch.device("cpu")
SHAPES = (Shape("tiny", "1,1", 2, 1, 16, vocab_size=32),)


def test_every_table_is_asked() -> None:
    tuner, asked = Tuner(Card("", "sm90", SHARED["sm90"]), lambda call: 0.0), set()
    for workload in workloads(SHAPES):
        if workload.name.endswith("forward"):  # there is one that trains, too
            continue
        call = workload.build(CPU, torch.float32, "triton")
        asked |= {table.name for table, _ in tuner._asked(call)}
    assert asked == {name for name, table in load_tables().items() if table.candidates}


def test_a_kernel_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that prefers one tile: each candidate compiles, gives the same result, and the best is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own_tiles.cache_clear()
    table = load_tables()["qk_norm_rope.forward"]
    monkeypatch.setattr(table, "candidates", {"ROWS": (4, 8)})
    ran: list[int] = []

    def measure(call: object) -> float:
        tile = table.forced or {}
        ran.append(tile["ROWS"])
        return 0.5 if tile["ROWS"] == 8 else 1.0

    lines: list[str] = []
    card = Card("Interpreter", "sm90", SHARED["sm90"])
    (workload,) = (w for w in workloads(SHAPES) if w.op == "qk_norm_rope" and w.name.endswith("forward"))
    call = workload.build(CPU, torch.float32, "triton")
    before = tensors(call())
    assert Tuner(card, measure, report=lines.append).run([(workload.name, lambda: call)]) == 1
    assert "2 of 2 tiles tried; 2.00 times as fast with ROWS 8" in lines[0] and {4, 8} < set(ran)
    assert table.choose(card, head_dim=16)["ROWS"] == 8
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(tensors(call()), before, strict=True))
    own_tiles.cache_clear()
    table.clear()
