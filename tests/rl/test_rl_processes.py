"""Several processes train as one, and a killed run goes on as if nothing had been."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvar.models import VAR
from fastvar.training.checkpoints import saved_steps
from fastvar.training.log import read_metrics
from tests.helpers.policies import policy

ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import sys; sys.path[:0] = [{root!r}]
from dataclasses import replace
from pathlib import Path
from tests.rl.test_trainer import *
torch.set_num_threads(1)
config = replace(QUICK, prompts=3, use_mask=True, normalise="batch", **{changes!r})
config = replace(config, loss=PolicyLossOptions(kl_weight=0.1))
var = add_adapters(policy(), 2) if {adapters} else policy()
VMRGRPOTrainer(var, patchy, PROMPTS, config, Path({output!r})).train()
"""

# accelerate's plugin shards on accelerators alone: its state is told that these processes have one
_ON_CPUS = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
"""
_PLUGIN = """
trainer = VMRGRPOTrainer(var, patchy, PROMPTS, config, Path({output!r}))
assert trainer.accelerator.is_fsdp2 and trainer.processes.count == 2
for part in (trainer.policy.blocks[0].qkv, trainer.policy.head):
    assert type(part.weight).__name__ == "DTensor", part
from torch.distributed.fsdp import FSDPModule
assert isinstance(trainer.policy.blocks[0], FSDPModule)  # gathered a block at a time
trainer.train()
"""

_SHARDED = """
import sys; sys.path[:0] = [{root!r}]
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastvar.models import SamplingOptions
from fastvar.rl import *
from fastvar.rl.wrapping import CalledPolicy, gather_for_methods
from fastvar.training.ema import EMA
from tests.helpers.policies import bitwise_policy, policy

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
advantages = torch.arange(8.0) - 3.5


def step(make, sharded):
    torch.manual_seed(0)
    var = make().add_subject()
    references = torch.rand(2, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(0))
    ema, model = EMA(var, 0.5), CalledPolicy(var)
    if sharded:
        for part in (*var.blocks, model):
            fully_shard(part, mesh=mesh)
        gather_for_methods(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prompts = Prompts(["1", "2"], references=references)
    with torch.no_grad():
        rollout = model(roll_out, prompts, group_size=4, seed=1, options=SamplingOptions())
    model(segment_loss, rollout, advantages, PolicyLossOptions()).loss.backward()
    assert not sharded or type(var.head.weight).__name__ == "DTensor"
    optimizer.step()
    ema.update(var)
    return [rollout.tokens, *ema.model.state_dict().values()]


for make in (policy, bitwise_policy):
    for one, two in zip(step(make, False), step(make, True), strict=True):
        torch.testing.assert_close(two, one)
"""


def script(folder: Path, name: str, adapters: bool = False, **changes: object) -> str:
    path = folder / f"{name}.py"
    names = {"root": str(ROOT), "tests": str(Path(__file__).parent), "output": str(folder / name)}
    path.write_text(_RUN.format(**names, changes=changes, adapters=adapters))
    return str(path)


def launch(processes: int, path: str) -> None:
    call("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", path)


def here(path: str) -> None:
    """One process, this one."""
    threads = torch.get_num_threads()
    runpy.run_path(path)
    torch.set_num_threads(threads)


def call(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "memory"))} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_two_processes_are_one(micro_batch: int, adapters: bool, tmp_path: Path) -> None:
    """Twelve rows in three groups of four: the second group straddles the processes. The reference is a copy, or the
    policy without its adapters."""
    common = {"adapters": adapters, "iterations": 4, "evaluate_every": 2, "evaluation_samples": 12}
    launch(1, script(tmp_path, "one", **common))
    launch(2, script(tmp_path, "two", micro_batch=micro_batch, **common))
    assert metrics(tmp_path / "one")[-1]["kl"] > 0
    same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Nine rows in three groups, which two processes cannot share out evenly: begun on one process and gone on with on
    two, the run is that of one."""
    common = {"group_size": 3, "filter_groups": False, "evaluate_every": 2, "evaluation_samples": 12}
    here(script(tmp_path, "one", iterations=4, **common))
    here(script(tmp_path, "two", iterations=2, **common))
    launch(2, script(tmp_path, "two", iterations=4, **common))
    assert metrics(tmp_path / "one")[-1]["kl"] > 0
    same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_accelerates_own_plugin(tmp_path: Path) -> None:
    """FSDP2 as recipes/fsdp2.yaml asks accelerate for it, with three prompts on two processes, micro-batches and an
    evaluation: the run of one process."""
    common = {"iterations": 4, "evaluate_every": 2, "evaluation_samples": 12, "micro_batch": 3}
    here(script(tmp_path, "one", **common))
    path = Path(script(tmp_path, "two", **common))
    text, end = path.read_text(), "VMRGRPOTrainer(var, patchy"
    assert text.count(end) == 1
    plugin = _PLUGIN.format(output=str(tmp_path / "two"))
    path.write_text(_ON_CPUS + text[: text.index(end)] + plugin)
    config = ["--config_file", ROOT / "recipes/fsdp2.yaml", "--num_processes", 2, "--main_process_port", 0]
    call("accelerate.commands.launch", *config, path)
    same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_launched_command(tmp_path: Path) -> None:
    """`accelerate launch -m fastvar rl` on two processes gives what `fastvar rl` gives on one."""
    policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n")
    run = ["rl", "--model", tmp_path / "policy", "--prompt-file", tmp_path / "prompts.txt", "--rewards", "colour"]
    run += ["--iterations", 3, "--prompts", 2, "--group-size", 3, "--middle", 1, "--kl-weight", 0.1]
    call("fastvar", *run, "--output", tmp_path / "one")
    launcher = ["--cpu", "--num_processes", 2, "--num_cpu_threads_per_process", 1, "--mixed_precision", "no"]
    call("accelerate.commands.launch", *launcher, "-m", "fastvar", *run, "--output", tmp_path / "two")
    same_run(tmp_path / "one", tmp_path / "two")


def same_run(one: Path, two: Path) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name, value in a.items():
            # shares of norms are not sums over parts; tokens of a trunk that two processes share are drawn by both
            if not name.startswith("gradient_share") and name != "rollout_tokens":
                assert b[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    weights = [VAR.from_pretrained(str(folder / "model")).state_dict() for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_sharded_weights(tmp_path: Path) -> None:
    """FSDP2 over two processes: the tokens, the step and the averaged weights of one process with all weights."""
    path = tmp_path / "sharded.py"
    path.write_text(_SHARDED.format(root=str(ROOT), tests=str(Path(__file__).parent)))
    launch(2, str(path))


@pytest.mark.slow
def test_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    """Killed at whatever it was doing, then called again: the same metrics and weights, phases included."""
    subprocess.run([sys.executable, script(tmp_path, "straight", iterations=12)], check=True, capture_output=True)
    path = script(tmp_path, "killed", iterations=12)
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not [step for step in saved_steps(tmp_path / "killed") if step >= 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= saved_steps(tmp_path / "killed")[-1] < 12
    subprocess.run([sys.executable, path], check=True, capture_output=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    straight, killed = (VAR.from_pretrained(str(tmp_path / n / "model")).state_dict() for n in ("straight", "killed"))
    assert all(torch.equal(value, killed[key]) for key, value in straight.items())
