"""Triton's kernels in its interpreter. It is chosen for a whole process, so that these tests have one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LONG = ("test_attention.py", "test_kernels.py", "test_log_probs.py", "test_sampling.py")  # the others share a process
OTHERS = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in (*LONG, Path(__file__).name))


@pytest.mark.slow
@pytest.mark.parametrize("files", [*([name] for name in LONG), OTHERS], ids=" ".join)
def test_kernels_in_the_interpreter(files: list[str]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", *(str(HERE / name) for name in files), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
    print(done.stdout.splitlines()[-1])
