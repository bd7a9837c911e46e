"""Runs of several processes, which take long to start: as many as can be in one launch of this module, with what is to
be run and a folder for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fastvar.models import SamplingOptions
from fastvar.rl import (
    PolicyLossOptions,
    Prompts,
    VMRGRPOTrainer,
    add_adapters,
    roll_out,
    segment_loss,
)
from fastvar.rl.wrapping import CalledPolicy, gather_for_methods
from fastvar.training import InfinityTask, train
from fastvar.training.ema import EMA
from fastvar.training.sharded import Blueprint, local
from tests.helpers.policies import bitwise_policy, policy
from tests.rl.test_trainer import PROMPTS, QUICK, patchy
from tests.training.test_infinity_task import Pictures, infinity, options

KINDS: dict[str, Callable[[], Any]] = {
    "var": policy,
    "adapters": lambda: add_adapters(policy(), 2),
    "infinity": bitwise_policy,
}
EVALUATED: dict[str, Any] = {"evaluate_every": 2, "evaluation_samples": 12}
UNEVEN: dict[str, Any] = {"group_size": 3, "filter_groups": False, **EVALUATED}
SHARDED: dict[str, Any] = {"micro_batch": 3, **EVALUATED}


def trainer(kind: str, folder: Path, reference: Any = None, **changes: Any) -> VMRGRPOTrainer[Any]:
    """Twelve rows in three groups of four, of which two processes share the second one."""
    torch.set_num_threads(1)
    config = replace(QUICK, prompts=3, use_mask=True, normalise="batch", loss=PolicyLossOptions(kl_weight=0.1))
    return VMRGRPOTrainer(KINDS[kind](), patchy, PROMPTS, replace(config, **changes), folder, reference)


def supervised(folder: Path, batch_size: int, draw: Any = None) -> Any:
    task = InfinityTask(infinity(condition_dropout=0.0), draw, flip_strength=0.0)
    return train(task, Pictures(), options(steps=2, batch_size=batch_size), folder)


def processes(folder: Path) -> None:
    """Under DDP, and weights sharded by hand."""
    for kind in KINDS:
        for micro_batch in (0, 4):
            changes = {"iterations": 4, "micro_batch": micro_batch, **EVALUATED}
            trainer(kind, folder / f"{kind}-{micro_batch}", **changes).train()
    trainer("var", folder / "uneven", iterations=4, **UNEVEN).train()
    sharded_step()


def sharded_step() -> None:
    """Tokens, step and averaged weights are those of whole weights; the average is nowhere whole."""
    for make in (policy, bitwise_policy):
        for one, two in zip(_step(make, False), _step(make, True), strict=True):
            torch.testing.assert_close(two, one)


def _step(make: Callable[[], Any], sharded: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    var = make().add_subject()
    references = torch.rand(2, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(0))
    blueprint, model = Blueprint(var, sharded=sharded), CalledPolicy(var)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for part in (*var.blocks, model):
            fully_shard(part, mesh=mesh)
        gather_for_methods(model)
    ema = EMA(blueprint, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prompts = Prompts(["1", "2"], references=references)
    with torch.no_grad():
        rollout = model(roll_out, prompts, group_size=4, seed=1, options=SamplingOptions())
    model(segment_loss, rollout, torch.arange(8.0) - 3.5, PolicyLossOptions()).loss.backward()
    assert not sharded or type(var.head.weight).__name__ == "DTensor"
    optimizer.step()
    ema.update(var)
    averaged = list(ema.model.state_dict().values())
    if sharded:
        assert_sharded(var, ema.model)
        averaged = [tensor.full_tensor() for tensor in averaged]
    return [rollout.tokens, *averaged]


def assert_sharded(*models: nn.Module) -> None:
    """About half of each on this process."""
    for model in models:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        own, all_of_it = (sum(map(torch.Tensor.numel, p)) for p in (map(local, model.parameters()), model.parameters()))
        assert 0.4 < own / all_of_it < 0.6, (own, all_of_it)


def plugin(folder: Path) -> None:
    """Under accelerate's own plugin for FSDP2, which shards on accelerators alone: its state is told that these
    processes have one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    reference = bitwise_policy()  # of two trainers
    for kind, iterations in (("var", 4), ("var", 6), ("infinity", 4), ("infinity", 4)):
        own = folder / kind
        changes: dict[str, Any] = {}
        if kind == "infinity":
            changes = {"continue_with": "reference", "reference": reference}
        training = trainer(kind, own, iterations=iterations, **SHARDED, **changes)
        assert training.accelerator.is_fsdp2 and training.processes.count == 2
        assert isinstance(training.policy.blocks[0], FSDPModule)  # gathered a block at a time
        models = (training.policy, training.ema.model, training.reference)
        assert_sharded(*models)
        averaged = training.train()
        assert_sharded(*models)
        assert (averaged is training.ema.model) != training.processes.main
        training.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # else those of the first model
    found = supervised(folder / "supervised", 2, lambda net: net.generate(["a"], seed=1).picture()).model
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


def killed(folder: Path) -> None:
    trainer("var", folder, iterations=12).train()


if __name__ == "__main__":
    {"processes": processes, "plugin": plugin, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
