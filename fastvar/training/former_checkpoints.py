"""Checkpoints of versions of fastvar that had no manifests: read as tensors and numbers, never as code."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastvar.training.checkpoints import read_tensors

_FILES = ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl")


def is_former(folder: Path) -> bool:
    """Whether all files of such a checkpoint are there; whether they are whole shows when they are read."""
    return all((folder / name).is_file() for name in _FILES)


def read_former(folder: Path, process: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Any]:
    """Weights, averaged weights, moments by "NUMBER.NAME" and the rest, as `Checkpoints` has them.

    Raises:
        ValueError: a damaged file, or one with something else in it than tensors and numbers; names it.
    """
    weights = read_tensors(folder / _FILES[0])
    consume_prefix_in_state_dict_if_present(weights, "module.")
    optimizer = _read(folder / _FILES[1])["state"]
    average = _read(folder / _FILES[2])
    progress = folder / "custom_checkpoint_1.pkl"
    return (
        weights,
        average["model"],
        {f"{number}.{name}": value for number, moments in optimizer.items() for name, value in moments.items()},
        {
            "average_updates": average["updates"],
            "progress": _read(progress) if progress.is_file() else {},
            "random": [None] * process + [_random(_read(folder / f"random_states_{process}.pkl"))],
        },
    )


def _read(path: Path) -> Any:
    from accelerate.utils import load

    try:
        return load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"train: output: {path}: damaged, or holds more than tensors and numbers; it is not read"
        ) from error


def _random(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "python": state["random_state"],
        "numpy": state["numpy_random_seed"],
        "torch": state["torch_manual_seed"].tolist(),
        "cuda": [own.tolist() for own in state.get("torch_cuda_manual_seed", [])],
    }
