"""Two processes train as one with the double batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvar.models import VQTokenizer
from fastvar.training.checkpoints import saved_steps
from fastvar.training.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_loop import *
torch.set_num_threads(1)
train(tokenizer_task(), scenes(), options(steps={steps}, batch_size={batch}), Path({output!r}))
"""


def launch(processes: int, batch: int, steps: int, output: Path, script: Path) -> None:
    tests = str(Path(__file__).parent)
    script.write_text(_RUN.format(root=str(ROOT), tests=tests, batch=batch, steps=steps, output=str(output)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(tmp_path: Path) -> None:
    launch(1, 4, 3, tmp_path / "one", tmp_path / "one.py")
    launch(2, 2, 3, tmp_path / "two", tmp_path / "two.py")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    weights = [VQTokenizer.from_pretrained(str(tmp_path / n / "model")).state_dict() for n in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)
    assert saved_steps(tmp_path / "two") == [2, 3]
    launch(2, 2, 3, tmp_path / "two", tmp_path / "two.py")  # finds itself finished
    assert read_metrics(tmp_path / "two" / "metrics.jsonl") == two
