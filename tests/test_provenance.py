"""What a report says of where it was made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvar
from fastvar import provenance


def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is told of a checkout of fastvar alone, not of another repository that an installed one lies in."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastvar", "demo", "--output", "a b"])
    monkeypatch.setattr(provenance, "_ROOT", tmp_path / "inside")
    found = provenance.provenance()
    assert found["command"] == "fastvar demo --output 'a b'"
    assert f"fastvar {fastvar.__version__}, torch {torch.__version__}" in found["versions"]
    assert found["hardware"].endswith(f", {torch.get_num_threads()} threads")
    assert "commit" not in found
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert provenance.provenance()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "inside" / "new").touch()
    assert provenance.provenance()["commit"] == f"{git('rev-parse', 'HEAD')} with changes"
