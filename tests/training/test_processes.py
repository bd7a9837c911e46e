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

ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import sys; sys.path[:0] = [{root!r}]
from pathlib import Path
from tests.training.test_loop import *
torch.set_num_threads(1)
train(tokenizer_task(), scenes(), options(steps={steps}, batch_size={batch}), Path({output!r}))
"""

_SHARDED = """
import sys; sys.path[:0] = [{root!r}]
from types import SimpleNamespace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.training.test_checkpoints import *
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
mesh = init_device_mesh("cpu", (2,))


def run(seed):
    torch.manual_seed(seed)
    model = Model()
    average = EMA(model, 0.5)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped = SimpleNamespace(optimizer=optimizer)
    return model, optimizer, average, Checkpoints(accelerator, Path({output!r}), model, wrapped, average, keep=1)


def step(model, optimizer, average, checkpoints):
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(model)
    return [p.full_tensor() for p in model.parameters()] + list(average.model.parameters())


straight, resumed = run(0), run(9)
step(*straight)
straight[-1].save(1)
expected = step(*straight)
assert resumed[-1].newest() == 1
resumed[-1].load(1)
assert type(resumed[0][0].weight).__name__ == "DTensor"
assert all(torch.equal(a, b) for a, b in zip(step(*resumed), expected, strict=True))
"""

_INFINITY = """
import sys; sys.path[:0] = [{root!r}]
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastvar.training.sharded import gather_for_methods
from tests.training.test_infinity_task import *
torch.set_num_threads(1)


def task():
    return InfinityTask(infinity(condition_dropout=0.0), flip_strength=0.0)


config = options(steps=2, batch_size=2, accumulate=2, precision="bf16")
train(task(), Pictures(), config, Path({output!r}))
mesh = init_device_mesh("cpu", (2,))
gradients = []
for sharded in (False, True):
    own = task()
    net = own.model
    if sharded:
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh)
        gather_for_methods(net)
        assert type(net.blocks[0].q_bias).__name__ == "DTensor"
    loss, _ = own.loss(net.train(), batch_of())
    loss.backward()
    found = [p.grad.full_tensor() if sharded else p.grad for p in net.parameters()]
    gradients.append([loss.detach(), *found])
for one, two in zip(*gradients, strict=True):
    torch.testing.assert_close(two, one)
"""


def launch(processes: int, batch: int, steps: int, output: Path, script: Path) -> None:
    tests = str(Path(__file__).parent)
    script.write_text(_RUN.format(root=str(ROOT), tests=tests, batch=batch, steps=steps, output=str(output)))
    start(processes, script)


def start(processes: int, script: Path) -> None:
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


@pytest.mark.slow
def test_checkpoints_of_sharded_weights(tmp_path: Path) -> None:
    """FSDP2 over two processes: whole tensors in the file, and the same step after a resume."""
    names = {"root": str(ROOT), "tests": str(Path(__file__).parent), "output": str(tmp_path / "run")}
    (tmp_path / "sharded.py").write_text(_SHARDED.format(**names))
    start(2, tmp_path / "sharded.py")
    assert load_file(tmp_path / "run/checkpoints/step-00000001/model.safetensors")["0.weight"].shape == (4, 3, 3, 3)


@pytest.mark.slow
def test_infinity_over_two_processes(tmp_path: Path) -> None:
    """As one with the double batch, micro-batches included; and with weights that FSDP2 has sharded."""
    path = tmp_path / "infinity.py"
    path.write_text(_INFINITY.format(root=str(ROOT), output=str(tmp_path / "two")))
    start(2, path)
    task = InfinityTask(infinity(condition_dropout=0.0), flip_strength=0.0)
    train(task, Pictures(), options(steps=2, batch_size=4, precision="bf16"), tmp_path / "one")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-2)
