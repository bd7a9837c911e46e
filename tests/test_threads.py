"""How OpenMP's threads wait is set before torch comes, unless the user did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("code", "user", "expected"),
    [
        ("import fastvar.cli, torch", {}, "2000"),
        ("import fastvar.training", {}, "2000"),
        ("import fastvar.rl", {}, "2000"),
        ("import fastvar.cli, torch", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import fastvar.cli, torch", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import fastvar.ops", {}, "None"),  # operators in other people's programs change nothing of them
        ("import fastvar, sys; assert 'torch' not in sys.modules; import torch", {}, "None"),
    ],
)
def test_before_torch_comes(code: str, user: dict[str, str], expected: str, tmp_path: Path) -> None:
    """A stand-in for torch says what it finds, and ends the process."""
    (tmp_path / "torch.py").write_text("import os; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); os._exit(0)")
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = {**kept, "PYTHONPATH": path, **user}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == expected, done.stderr


def test_after_torch_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP would not see it, and a child process might."""
    import importlib

    import fastvar.threads

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.reload(fastvar.threads)
    assert "GOMP_SPINCOUNT" not in os.environ
