"""Several processes train as one, and a killed run goes on as if nothing had been."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.models import VAR, Infinity
from fastvar.models.pretrained import saved_class
from fastvar.training.checkpoints import saved_steps
from fastvar.training.log import read_metrics
from tests.helpers import launched
from tests.helpers.launched import EVALUATED, SHARDED, UNEVEN
from tests.helpers.policies import policy

ROOT = Path(__file__).resolve().parents[2]


def here(kind: str, folder: Path, **changes: Any) -> Path:
    """One process, this one."""
    threads = torch.get_num_threads()
    launched.trainer(kind, folder, **changes).train()
    torch.set_num_threads(threads)
    return folder


def call(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "memory"))} for line in lines]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made."""
    folder = tmp_path_factory.mktemp("pair")
    here("var", folder / "uneven", iterations=2, **UNEVEN)
    call(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.helpers.launched",
        "processes",
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made under accelerate's own FSDP2 plugin, as recipes/fsdp2.yaml asks accelerate for it."""
    folder = tmp_path_factory.mktemp("sharded")
    here("var", folder / "var", iterations=2, **SHARDED)
    config = ["--config_file", ROOT / "recipes/fsdp2.yaml", "--num_processes", 2, "--main_process_port", 0]
    call("accelerate.commands.launch", *config, "-m", "tests.helpers.launched", "plugin", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", launched.KINDS)
def test_two_processes_are_one(kind: str, pair: Path, tmp_path: Path) -> None:
    """Twelve rows in three groups of four: the second group straddles the processes. The reference is a copy, or the
    policy without its adapters. In one micro-batch and in several."""
    one = here(kind, tmp_path, iterations=4, **EVALUATED)
    assert metrics(one)[-1]["kl"] > 0
    for micro_batch in (0, 4):
        same_run(one, pair / f"{kind}-{micro_batch}")


@pytest.mark.slow
def test_another_number_of_processes_goes_on(pair: Path, tmp_path: Path) -> None:
    """Nine rows in three groups, which two processes cannot share out evenly: begun on one process and gone on with on
    two, the run is that of one."""
    one = here("var", tmp_path, iterations=4, **UNEVEN)
    assert metrics(one)[-1]["kl"] > 0
    same_run(one, pair / "uneven")


@pytest.mark.slow
def test_accelerates_own_plugin(sharded: Path, tmp_path: Path) -> None:
    """Three prompts on two processes, micro-batches and evaluations: begun with whole weights on one process, gone on
    with on two with sharded ones, once more with those, and on one again, the run is that of one process."""
    one = here("var", tmp_path, iterations=8, **SHARDED)
    same_run(one, here("var", sharded / "var", iterations=8, **SHARDED))


@pytest.mark.slow
def test_sharded_infinity(sharded: Path, tmp_path: Path) -> None:
    """Its reference, which is sharded too, draws the continuations."""
    same_run(here("infinity", tmp_path, iterations=4, continue_with="reference", **SHARDED), sharded / "infinity")


@pytest.mark.slow
def test_sharded_supervised_training(sharded: Path, tmp_path: Path) -> None:
    """Two processes with half of the batch each, and a picture of the averaged weights."""
    launched.supervised(tmp_path, 4, lambda net: net.generate(["a"], seed=1).picture())
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, sharded / "supervised"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    same_weights(tmp_path, sharded / "supervised")
    assert len(list((sharded / "supervised/pictures").iterdir())) == 1


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


def loaded(folder: Path) -> VAR | Infinity:
    kind = saved_class(folder / "config.json")
    assert kind in (VAR, Infinity)
    return kind.from_pretrained(folder)  # type: ignore[return-value]


def same_run(one: Path, two: Path) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name, value in a.items():
            # shares of norms are not sums over parts; tokens of a trunk that two processes share are drawn by both
            if not name.startswith("gradient_share") and name != "rollout_tokens":
                assert b[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    same_weights(one, two)


def same_weights(one: Path, two: Path) -> None:
    weights = [loaded(folder / "model").state_dict() for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    """Killed at whatever it was doing, then called again: the same metrics and weights, phases included."""
    here("var", tmp_path / "straight", iterations=12)
    command = [sys.executable, "-m", "tests.helpers.launched", "killed", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not [step for step in saved_steps(tmp_path / "killed") if step >= 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= saved_steps(tmp_path / "killed")[-1] < 12
    here("var", tmp_path / "killed", iterations=12)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    straight, killed = (VAR.from_pretrained(str(tmp_path / n / "model")).state_dict() for n in ("straight", "killed"))
    assert all(torch.equal(value, killed[key]) for key, value in straight.items())
