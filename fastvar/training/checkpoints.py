"""Checkpoints of a run: whole folders that appear at once, the newest whole one is resumed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def saved_steps(output: Path) -> list[int]:
    """The steps that have a whole checkpoint, in order."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8})", name)))


def remove_checkpoints(output: Path) -> None:
    """Forget an old run, so that its checkpoints are not mixed with those of a new one."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def load_checkpoint(accelerator: Accelerator, output: Path, step: int, optimizer: Any) -> None:
    """Read back what `save_checkpoint` wrote.

    The optimizer's moments get the memory layout of their parameters, which may have been another when they were saved:
    fused optimizers pair the two by their places in memory.
    """
    accelerator.load_state(str(checkpoint_folder(output, step)))
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if moment and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> Path:
    """Write model, optimizer, averaged weights and random states of all processes, then drop all but the newest.

    The folder is written beside its place and renamed into it: whoever reads it finds all of it or nothing. A step that
    has a checkpoint keeps it.

    Args:
        accelerator: holds what is saved (prepared models and optimizers, objects registered for checkpointing).
        output: the run's folder.
        step: optimizer steps done.
        keep: how many checkpoints to keep, at least 1.
    """
    folder = checkpoint_folder(output, step)
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        os.replace(temporary, folder)
        for old in saved_steps(output)[:-keep]:
            shutil.rmtree(checkpoint_folder(output, old), ignore_errors=True)
    accelerator.wait_for_everyone()
    return folder
