"""State dicts of the public code bases: where they are read from, and how errors name what they lack."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvar.files import read_json_object
from fastvar.weights import read_weights, without_wrappers

State = Mapping[str, torch.Tensor]
StateOrPath = State | str | os.PathLike[str]
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


class PublicState(dict[str, torch.Tensor]):
    """Tensors by their public names; `owner`, "function: argument" as it opens messages, the file or a word for it in
    `source`, and the `prefix` that their names have there."""

    def __init__(self, tensors: State, owner: str, source: str) -> None:
        found, self.prefix = without_wrappers(tensors)
        super().__init__(found)
        self.owner, self.source = owner, source

    def need(self, dimensions: Mapping[str, int]) -> None:
        """Raise a ValueError that names every key which is missing or has another number of dimensions."""
        problems = [f"missing key {self.prefix}{name}" for name in dimensions if name not in self]
        problems += [
            f"{self.prefix}{name}: expected {wanted} dimensions, got shape {tuple(self[name].shape)}"
            for name, wanted in dimensions.items()
            if name in self and self[name].ndim != wanted
        ]
        if problems:
            there = ", ".join(f"{self.prefix}{name}" for name in list(self)[:5]) or "none"
            raise ValueError(f"{self.owner}: {'; '.join(problems)}; {len(self)} keys are there: {there}")


def read_state(source: StateOrPath, owner: str, *nested: str, mapped: bool = False) -> PublicState:
    """A state dict, or that of a file or of a folder of shards.

    Args:
        source: the state dict or a path. No code of a file is run.
        owner: "function: argument", as it opens messages.
        nested: keys under which it may lie, each within the former.
        mapped: leave tensors in the file, see `fastvar.weights.read_weights`.

    Raises:
        OSError: a file that cannot be read.
        ValueError: something else than tensors.
    """
    state: Any = source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        state = _read_folder(path, owner, mapped) if path.is_dir() else read_weights(path, owner, mapped=mapped)
    for name in nested:
        state = state.get(name, state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise ValueError(f"{owner}: expected a state dict, got {type(state).__name__}")
    wrong = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if wrong:
        raise ValueError(f"{owner}: expected tensors only, got other values under {wrong[:5]}")
    return PublicState(state, owner, "a state dict" if isinstance(source, Mapping) else str(source))


def _read_folder(folder: Path, owner: str, mapped: bool) -> dict[str, Any]:
    """The tensors of a folder's shards: those that its index names, or of the only file of weights that it has."""
    indices = sorted(folder.glob("*.index.json"))
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    if len(indices) > 1 or (not indices and len(files) != 1):
        there = ", ".join(path.name for path in indices or files) or "none"
        raise ValueError(f"{owner}: {folder}: expected one index or one file of weights, got {there}")
    if not indices:
        return read_weights(files[0], owner, mapped=mapped)
    places = read_json_object(indices[0], owner).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{owner}: {indices[0]}: expected a weight_map from tensors to files")
    if any(Path(name).name != name for name in places.values()):
        raise ValueError(f"{owner}: {indices[0]}: expected files of this folder, got others")
    state: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        shard = read_weights(folder / name, owner, mapped=mapped)
        state.update(shard if isinstance(shard, Mapping) else {name: shard})
    missing = [name for name in places if name not in state]
    if missing:
        raise ValueError(f"{owner}: {indices[0]}: its files lack {missing[:5]}")
    return state


def count(state: State, pattern: str) -> int:
    """How many numbers fill the pattern's one group over all keys: 1 + the largest."""
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def renamed(state: State, names: Mapping[str, str], left_out: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Tensors by our names, of those public names that are not left out; in both `{i}` stands for a block's number. An
    unknown one keeps its name, so that strict loading names it."""
    weights = {}
    for name, tensor in state.items():
        general, number = _general(name)
        if general not in left_out:
            weights[names.get(general, general).replace("{i}", number)] = tensor
    return weights


def public_name(ours: str, names: Mapping[str, str]) -> str:
    """The public name of one of our weights, the inverse of `renamed`."""
    general, number = _general(ours)
    return {own: public for public, own in names.items()}.get(general, general).replace("{i}", number)


def _general(name: str) -> tuple[str, str]:
    """A name with {i} for the number of its block, and the number."""
    number = re.search(r"(?<=blocks\.)\d+", name)
    return re.sub(r"(?<=blocks\.)\d+", "{i}", name, count=1), number[0] if number else ""
