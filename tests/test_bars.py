"""Progress bars are drawn on terminals and in notebooks, and nowhere else."""

from __future__ import annotations

import io
import sys
import types

import pytest

from fastvar.bars import progress_bar


@pytest.mark.parametrize(
    ("terminal", "notebook", "active", "drawn"),
    [(True, False, True, True), (False, True, True, True), (False, False, True, False), (True, True, False, False)],
)
def test_where_bars_are_drawn(
    terminal: bool, notebook: bool, active: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert list(progress_bar(range(3), active=active, desc="steps")) == [0, 1, 2]
    assert ("steps: 100%" in stream.getvalue()) is drawn
