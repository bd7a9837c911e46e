"""What a run was begun with, and how it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastvar.files import json_text
from fastvar.rl.config import MAY_CHANGE, RLConfig
from fastvar.rl.processes import Processes
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rewards.base import plain_options
from fastvar.training.checkpoints import Checkpoints
from fastvar.training.settings import SEEDS, check_enough_steps, check_same_settings, write_settings


def run_settings(
    config: RLConfig, policy: Any, trained: nn.Module, start: int, reward: RewardSum, prompts: Prompts
) -> dict[str, Any]:
    """What decides the result of a run, as JSON has it.

    Args:
        config: how it trains.
        policy: the model, which has a `config`.
        trained: the same as it is trained, perhaps wrapped.
        start: the fingerprint of the weights that the run begins with.
        reward: what scores.
        prompts: what is drawn.
    """
    settings = {
        "rl": config.settings(policy),
        "model": asdict(policy.config),
        "trained": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "start": start,
        "rewards": {**reward.weights, "standardise": reward.standardise, **_reward_options(reward)},
        "prompts": prompts.fingerprint(),
        "seeds": SEEDS,
    }
    return json.loads(json_text(settings))


def begin(
    output: Path, settings: dict[str, Any], config: RLConfig, checkpoints: Checkpoints, processes: Processes
) -> int:
    """Load the newest checkpoint, if there is one to go on from, or else clear the folder; the iteration to begin with.

    Raises:
        ValueError: the folder holds a run with other settings, or one that has gone further than it is asked to.
    """
    step = checkpoints.newest() if config.resume else None
    if step is not None:
        check_same_settings(output / "settings.json", settings, may_change=MAY_CHANGE)
        check_enough_steps("iterations", config.iterations, step, output)
        checkpoints.load(step)
        if processes.main and step == 0:  # stopped before the first step: its first evaluation is made again
            (output / "metrics.jsonl").unlink(missing_ok=True)
    elif processes.main:
        checkpoints.clear()
        for name in ("best", "pictures", "tensorboard"):
            shutil.rmtree(output / name, ignore_errors=True)
        (output / "metrics.jsonl").unlink(missing_ok=True)
    if processes.main:
        write_settings(output / "settings.json", settings, step, config.iterations)
    processes.accelerator.wait_for_everyone()
    if step is None:
        checkpoints.save(0)
    return step or 0


def _reward_options(reward: RewardSum) -> dict[str, Any]:
    """What tells a reward from another one of its name."""
    return {
        f"{name}.{option}": value
        for name, function in reward.rewards.items()
        for option, value in plain_options(function).items()
        if option != "concurrent"  # when it is asked
    }
