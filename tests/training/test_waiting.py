"""Steps of training and updates of reinforcement learning do not wait for the device, but an update once.

On a CPU the host's own checks of labels and tokens, which no other device is asked for, are left out, and operators run
as their references. Copies from and to a GPU show on tensors that are fakes, for which there is no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fastvar.kernels.token_log_probs import checks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastvar.models import VAR
from fastvar.ops import _dispatch
from fastvar.rl import PolicyLossOptions, RLConfig, rows
from fastvar.rl import trainer as rl_trainer
from fastvar.training import TrainConfig, VARTask, loop, train
from fastvar.training.ema import EMA
from tests.helpers import waits
from tests.helpers.waiting import Waits
from tests.rl.test_wiring import QUICK, trainer
from tests.training.test_loop import TASKS, options, scenes


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on another device than a CPU."""

    def unseen(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments)

        return call

    monkeypatch.setattr(VAR, "indices", unseen(VAR.indices))
    for module in (rows, rl_trainer):
        monkeypatch.setattr(module, "indices", unseen(rows.indices))  # a list of the host's, which is not waited for
    monkeypatch.setattr(checks, "check_range", lambda *_: None)
    monkeypatch.setattr(_dispatch, "PREFERENCE", _dispatch.parse_preference("reference"))
    _dispatch.forget_answers()
    yield
    _dispatch.forget_answers()


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_elsewhere: None) -> None:
    """Forward and backward passes, clipping, the check of the gradient, the fused optimizer, averages."""
    seen: list[list[str]] = []

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with Waits() as found:
                answer = function(*arguments)
            seen.append(found.seen)
            return answer

        return call

    monkeypatch.setattr(loop, "_step", watched(loop._step))
    monkeypatch.setattr(EMA, "update", watched(EMA.update))
    train(TASKS[name](), scenes(), options(steps=2, accumulate=2, log_every=9, save_every=9), tmp_path)
    assert len(seen) == 4 and not any(seen[2:]), "what is kept for a schedule is made in the first step"


@pytest.mark.parametrize(
    "config",
    [QUICK, replace(QUICK, micro_batch=3, filter_groups=True, loss=PolicyLossOptions(kl_weight=0.1))],
    ids=["plain", "kl"],
)
def test_an_update(config: RLConfig, tmp_path: Path, as_elsewhere: None) -> None:
    """All but the optimizer, which on a CPU reads its own count of steps: on a GPU that count is the host's."""
    rl = trainer(tmp_path, config)
    rl.optimizer.step = Mock()
    for iteration in range(2):
        rollout = rl.roll_out(iteration)
        graded = rl.grade(rollout)
        old = None
        for _ in range(2):
            with Waits() as found:
                _, old = rl.update(rollout, graded, old)
    assert found.seen == ["tolist"]
    assert rl.optimizer.step.call_count == 4


def test_what_follows_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which here makes gradients of zeros."""
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    with FakeTensorMode(allow_non_fake_inputs=True):
        var = waits.fake_var().train()
        task = object.__new__(VARTask)  # as in `tests/models/test_steps.py`
        task.model, task.label_smoothing, task.token_weights = var, 0.1, torch.ones(14, device=waits.GPU)
        adamw = torch.optim.AdamW(loop.parameter_groups(var, 0.1), fused=True)
        optimizer = SimpleNamespace(
            optimizer=adamw, param_groups=adamw.param_groups, step=adamw.step, zero_grad=adamw.zero_grad
        )

        def backward(loss: torch.Tensor) -> None:
            for parameter in var.parameters():
                parameter.grad = torch.zeros_like(parameter)

        accelerator = SimpleNamespace(
            device=waits.GPU,
            backward=backward,
            no_sync=lambda model: nullcontext(),
            clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        )
        config = TrainConfig(steps=2, batch_size=4, accumulate=2)
        part = loop._part_of(accelerator, task, var, config)
        batch = {"image": torch.zeros(4, 3, 6, 6, device=waits.GPU), "label": torch.arange(4, device=waits.GPU)}
        ema = EMA(SimpleNamespace(clone=waits.fake_var), 0.9)
        for step in range(2):
            with waits.Waits() as watched:
                loop._step(accelerator, task, var, optimizer, part, batch, config, step)
                ema.update(var)
    assert watched.calls > 100


def test_grading(tmp_path: Path, as_elsewhere: None) -> None:
    """In one process: what rewards are is read at once, and so is which rows are trained; what remains are checks of
    scores, shares, and what the coarse state explains."""
    rl = trainer(tmp_path)
    rollout = rl.roll_out(0)
    with Waits() as found:
        rl.grade(rollout)
    reads = [name for name in found.seen if name != "lift_fresh"]  # that is a number of the host that fills a part
    assert len(reads) <= 12, reads
