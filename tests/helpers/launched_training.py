"""Supervised training of two processes, in one launch of this module with a folder for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastvar.training import InfinityTask, train
from fastvar.training.checkpoints import Checkpoints
from fastvar.training.ema import EMA
from fastvar.training.log import read_metrics
from fastvar.training.sharded import Blueprint, gather_for_methods
from tests.training import test_infinity_task as of_infinity
from tests.training import test_loop as of_loop
from tests.training.test_checkpoints import Model


def tokenizer(folder: Path) -> None:
    """Twice: the second time it finds itself finished."""
    logged = []
    for _ in range(2):
        train(of_loop.tokenizer_task(), of_loop.scenes(), of_loop.options(steps=3, batch_size=2), folder)
        logged.append(read_metrics(folder / "metrics.jsonl"))
    assert logged[0] == logged[1]


def checkpoints_of_sharded_weights(folder: Path) -> None:
    """The same step, bit by bit, after a resume."""
    accelerator = Accelerator(cpu=True)
    mesh = init_device_mesh("cpu", (2,))

    def run(seed: int) -> Any:
        torch.manual_seed(seed)
        model = Model()
        blueprint = Blueprint(model, sharded=True)
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        average = EMA(blueprint, 0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        wrapped = SimpleNamespace(optimizer=optimizer)
        return model, optimizer, average, Checkpoints(accelerator, folder, model, wrapped, average, keep=1)

    def step(model: Any, optimizer: Any, average: EMA, checkpoints: Checkpoints) -> list[torch.Tensor]:
        model(torch.ones(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        return [p.full_tensor() for net in (model, average.model) for p in net.parameters()]

    straight, resumed = run(0), run(9)
    step(*straight)
    straight[-1].save(1)
    expected = step(*straight)
    assert resumed[-1].newest() == 1
    resumed[-1].load(1)
    assert type(resumed[0][0].weight).__name__ == "DTensor"
    assert all(torch.equal(a, b) for a, b in zip(step(*resumed), expected, strict=True))


def infinity(folder: Path) -> None:
    """Under DDP in micro-batches; and sharded by hand: the same gradients."""

    def task() -> InfinityTask:
        return InfinityTask(of_infinity.infinity(condition_dropout=0.0), flip_strength=0.0)

    config = of_infinity.options(steps=2, batch_size=2, accumulate=2, precision="bf16")
    train(task(), of_infinity.Pictures(), config, folder)
    mesh = init_device_mesh("cpu", (2,))
    gradients = []
    for sharded in (False, True):
        own = task()
        net: Any = own.model
        if sharded:
            for part in (*net.blocks, net):
                fully_shard(part, mesh=mesh)
            gather_for_methods(net)
            assert type(net.blocks[0].q_bias).__name__ == "DTensor"
        loss, _ = own.loss(net.train(), of_infinity.batch_of())
        loss.backward()
        found = [p.grad.full_tensor() if sharded else p.grad for p in net.parameters()]
        gradients.append([loss.detach(), *found])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(two, one)


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    tokenizer(output / "tokenizer")
    checkpoints_of_sharded_weights(output / "sharded")
    infinity(output / "infinity")
