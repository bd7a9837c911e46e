"""Checkpoints of a run: whole folders of tensors and JSON that appear at once; the newest whole one is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastvar.files import replacing
from fastvar.training.ema import EMA
from fastvar.training.log import say
from fastvar.training.sharded import placed_like

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
_WEIGHTS, _AVERAGE, _MOMENTS = "model.safetensors", "average.safetensors", "optimizer.safetensors"
_STATE = "state.json"
ANEW = "choose another folder, or start anew with --no-resume (in Python resume=False)"


class Progress(Protocol):
    """What a run has to remember besides weights, as JSON has it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def saved_steps(output: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8})", name)))


class Checkpoints:
    """The checkpoints of a run: the weights in training and their average, the optimizer's moments, the random states
    of all processes.

    Nothing that is read can run code: tensors are safetensors, all else is JSON. A manifest has the size and the
    SHA-256 of every file; a folder that does not fit its manifest is left out by name.

    Args:
        accelerator: of the run; the files are those of the main process, in a folder that all processes see.
        output: the run's folder.
        model: in training, possibly wrapped for several processes (DDP, FSDP2).
        optimizer: prepared by the accelerator.
        average: of the weights.
        keep: how many checkpoints to keep, at least 1.
        minutes: from the end of one checkpoint until the next one is `due`; 0 for never.
        progress: what else there is to remember.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        model: torch.nn.Module,
        optimizer: Any,
        average: EMA,
        *,
        keep: int,
        minutes: float = 0.0,
        progress: Progress | None = None,
    ) -> None:
        self.accelerator, self.output, self.optimizer = accelerator, output, optimizer.optimizer
        self.model = accelerator.unwrap_model(model)
        self.average, self.keep, self.progress = average, keep, progress
        self._least = self._wait = 60 * minutes
        self._saved = time.monotonic()

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint, or None where there is no checkpoint at all. One that does not fit
        its manifest is named on standard error, and the one before it is taken.

        Raises:
            ValueError: there are checkpoints, none of them whole.
        """
        from accelerate.utils import broadcast_object_list

        answer: list[Any] = [None, None]  # the step, an error
        if self.accelerator.is_main_process:
            problems = []
            for step in reversed(saved_steps(self.output)):
                problem = what_is_wrong(checkpoint_folder(self.output, step))
                if problem is None:
                    answer[0] = step
                    break
                problems.append(problem)
            said = "; ".join(problems)
            if answer[0] is None and problems:
                answer[1] = f"train: output: no checkpoint that is whole: {said}; {ANEW}"
            elif problems:
                say(f"{said}: going on from {checkpoint_folder(self.output, answer[0])}")
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def clear(self) -> None:
        """Forget an old run, so that its checkpoints are not mixed with those of a new one."""
        for pattern in ("step-*", ".step-*"):
            for folder in (self.output / "checkpoints").glob(pattern):
                shutil.rmtree(folder)

    def due(self) -> bool:
        """Whether it is time for a checkpoint besides those of certain steps."""
        return 0 < self._wait < time.monotonic() - self._saved

    def save(self, step: int) -> Path:
        """Write a checkpoint, then drop all but the newest.

        The folder is written beside its place and renamed into it: whoever reads it finds all of it or nothing. A step
        that has a whole checkpoint keeps it.

        Args:
            step: optimizer steps done.

        Raises:
            OSError: it could not be written, as on a full disk; what was there before is still there.
        """
        from accelerate.utils import gather_object

        accelerator, folder, start = self.accelerator, checkpoint_folder(self.output, step), time.monotonic()
        weights = self._whole(self.model.state_dict())
        average = self._whole(self.average.model.state_dict())
        moments = self._whole(_flat(self.optimizer.state_dict()["state"]))
        state = {
            "step": step,
            "average_updates": self.average.updates,
            "progress": self.progress.state_dict() if self.progress else {},
            "random": gather_object([_random_state()]),
        }
        if accelerator.is_main_process and (not folder.is_dir() or what_is_wrong(folder)):
            with replacing(folder) as temporary:
                temporary.mkdir()
                save_file(weights, temporary / _WEIGHTS)
                save_file(average, temporary / _AVERAGE)
                save_file(moments, temporary / _MOMENTS)
                (temporary / _STATE).write_text(json.dumps(state))
                files = {path.name: measured(path) for path in sorted(temporary.iterdir())}
                (temporary / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
                for path in temporary.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            # A newer one is broken, or this would go on from it: it must not drive out whole ones.
            for old in [saved for saved in saved_steps(self.output) if saved <= step][: -self.keep]:
                shutil.rmtree(checkpoint_folder(self.output, old), ignore_errors=True)
        accelerator.wait_for_everyone()
        self._saved = time.monotonic()
        # Where writing takes long, it must not take more than a twentieth of the time.
        self._wait = max(self._least, 20 * (self._saved - start)) if self._least else 0.0
        return folder

    def load(self, step: int) -> None:
        """Read back what `save` wrote, or a version of fastvar that had no manifests.

        Raises:
            ValueError: a file that holds something else; names it. No code in it is run.
        """
        folder = checkpoint_folder(self.output, step)
        try:
            if (folder / MANIFEST).is_file():
                weights, average, moments = (read_tensors(folder / name) for name in (_WEIGHTS, _AVERAGE, _MOMENTS))
                state = _read_state(folder / _STATE)
            else:
                from fastvar.training.former_checkpoints import read_former

                weights, average, moments, state = read_former(folder, self.accelerator.process_index)
            own = self.model.state_dict()
            self.model.load_state_dict({name: placed_like(own.get(name), value) for name, value in weights.items()})
            self.average.load_state_dict({"model": average, "updates": state["average_updates"]})
            load_moments(self.optimizer, moments)
            if self.progress:
                self.progress.load_state_dict(state["progress"])
            states = state["random"]
            if self.accelerator.process_index < len(states):  # processes that were not there have none
                _set_random_state(states[self.accelerator.process_index])
        except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"train: output: {folder} does not hold a checkpoint of this run: {error}") from error
        self._saved = time.monotonic()

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the main process writes them: sharded ones are gathered one by one, on all processes."""
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.accelerator.is_main_process:
                whole[name] = tensor.detach().cpu().contiguous()
        return whole


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None; names folder and file."""
    path = folder / MANIFEST
    if not path.is_file():
        from fastvar.training.former_checkpoints import is_former

        return None if is_former(folder) else f"{folder}: {MANIFEST} is missing"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"{folder}: {name} is missing"
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{folder}: {name} has {size} bytes, expected {expected['bytes']}"
            if measured(folder / name) != expected:
                return f"{folder}: {name} is damaged: its checksum is not that of the manifest"
    except OSError as error:
        return f"{folder}: cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder}: {MANIFEST} is damaged"
    missing = {_WEIGHTS, _AVERAGE, _MOMENTS, _STATE} - set(files)
    return f"{folder}: {MANIFEST} does not name {', '.join(sorted(missing))}" if missing else None


def measured(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ValueError for another one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"train: output: {path}: not a file of tensors: {error}") from error


def _read_state(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"train: output: {path}: not JSON: {error}") from error


def _flat(moments: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The optimizer's tensors by "NUMBER.NAME" of parameter and moment."""
    return {f"{number}.{name}": value for number, state in moments.items() for name, value in state.items()}


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Give an optimizer its moments back; its settings are those of the run, which were compared.

    Moments get the memory layout of their parameters, which may have been another when they were saved: fused
    optimizers pair the two by their places in memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            local = torch.empty_like(parameter, dtype=value.dtype)
            value = local.copy_(placed_like(parameter, value))
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state() -> dict[str, Any]:
    """The states of this process's generators, as JSON has them."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(own, dtype=torch.uint8) for own in state["cuda"]])
