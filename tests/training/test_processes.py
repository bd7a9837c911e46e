"""Two processes train as one with the double batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvar.models import VQTokenizer
from fastvar.training import InfinityTask, train
from fastvar.training.checkpoints import saved_steps
from fastvar.training.log import read_metrics
from tests.training.test_infinity_task import Pictures, infinity, options
from tests.training.test_loop import options as loop_options
from tests.training.test_loop import scenes, tokenizer_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, in one launch."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.helpers.launched_training", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(pair: Path, tmp_path: Path) -> None:
    train(tokenizer_task(), scenes(), loop_options(steps=3, batch_size=4), tmp_path)
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, pair / "tokenizer"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    weights = [VQTokenizer.from_pretrained(str(n / "model")).state_dict() for n in (tmp_path, pair / "tokenizer")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)
    assert saved_steps(pair / "tokenizer") == [2, 3]


@pytest.mark.slow
def test_checkpoints_of_sharded_weights(pair: Path) -> None:
    """FSDP2 over two processes: whole tensors in the file, and the same step after a resume."""
    for name in ("model", "average"):
        found = load_file(pair / f"sharded/checkpoints/step-00000001/{name}.safetensors")
        assert found["0.weight"].shape == (4, 3, 3, 3)


@pytest.mark.slow
def test_infinity_over_two_processes(pair: Path, tmp_path: Path) -> None:
    """As one with the double batch, micro-batches included; and with weights that FSDP2 has sharded."""
    task = InfinityTask(infinity(condition_dropout=0.0), flip_strength=0.0)
    train(task, Pictures(), options(steps=2, batch_size=4, precision="bf16"), tmp_path)
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, pair / "infinity"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-2)
