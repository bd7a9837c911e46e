"""Saving and loading of models: a dataclass config as config.json beside model.safetensors."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from fastvar.files import read_json_object, replacing, write_json
from fastvar.ranges import fitted
from fastvar.weights import read_weights, without_wrappers

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
RUN_MODEL = "model"  # where a run's folder has its model
_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class PretrainedModel(nn.Module, ModelHubMixin):
    """A module with `save_pretrained`, `from_pretrained` and `push_to_hub` for local folders and the Hugging Face hub.

    A subclass names its config's dataclass in `config_class`, takes a config as its first argument and keeps it as
    `self.config`.
    """

    config_class: ClassVar[type]
    keeps_dtype: ClassVar[bool] = False  # of the weights that it loads; otherwise they become float32
    config: Any

    def clone(self, device: torch.device | str | None = None) -> Self:
        """A copy with weights of its own, adapters included; where this one is, or on a device."""
        return copy.deepcopy(self, {} if device is None else weights_on(self, device))

    def save_pretrained(  # the mixin's would delete the former config first
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write config.json and model.safetensors into a folder; each file is replaced at once.

        Args:
            save_directory: the folder; other files in it are left alone.
            push_to_hub: also upload it.
            repo_id: "owner/name" on the hub; the folder's name by default.
            options: of the upload, see `huggingface_hub.ModelHubMixin.push_to_hub`.
        """
        self._save_pretrained(Path(save_directory))
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **options)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(save_directory / WEIGHTS_NAME) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        write_json(save_directory / CONFIG_NAME, dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """A model in evaluation mode, on the CPU, from a folder that `save_pretrained` wrote or from the hub.

        Args:
            pretrained_model_name_or_path: a folder, or that of a run, whose model it then is, or "owner/name" on the
                Hugging Face hub.
            options: those of the hub: revision, cache_dir, force_download, local_files_only, token.

        Raises:
            FileNotFoundError: no such folder, or a file that is not in it.
            ValueError: a model of another class, a config with unknown fields, weights that do not fit it, a damaged
                file, an unknown option.
        """
        source = str(pretrained_model_name_or_path)
        unknown = sorted(set(options) - set(_HUB_OPTIONS))
        if unknown:
            raise ValueError(f"from_pretrained: expected options out of {_HUB_OPTIONS}, got {unknown}")
        if not os.path.isdir(source) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
            raise FileNotFoundError(f"from_pretrained: no such folder: {source}")
        if not os.path.isfile(os.path.join(source, CONFIG_NAME)):
            model = os.path.join(source, RUN_MODEL)
            source = model if os.path.isfile(os.path.join(model, CONFIG_NAME)) else source
        return cls._from_pretrained(model_id=source, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, subfolder: str = "", **hub: Any) -> Self:
        config = load_config(cls.config_class, Path(_file(model_id, subfolder, CONFIG_NAME, **hub)))
        path = _file(model_id, subfolder, WEIGHTS_NAME, **hub)
        state, prefix = without_wrappers(read_weights(path, cls.__name__))
        with torch.device("meta") if cls.keeps_dtype else nullcontext():
            model = cls(config)
        load_strictly(model, state, path, prefix=prefix, assign=cls.keeps_dtype)
        return model.eval()


def weights_on(module: nn.Module, device: torch.device | str) -> dict[int, torch.Tensor]:
    """What `copy.deepcopy` is to take in place of a module's weights so that its copy is on a device; nothing is copied
    where they are."""
    found: dict[int, torch.Tensor] = {
        id(weight): nn.Parameter(weight.detach().to(device, copy=True), weight.requires_grad)
        for weight in module.parameters()
    }
    return found | {id(buffer): buffer.detach().to(device, copy=True) for buffer in module.buffers()}


def saved_class(config: Path) -> type[PretrainedModel] | None:
    """Which of fastvar's models a config.json is of, as its fields say; None for none of them."""
    names = set(read_json_object(config, "from_pretrained"))
    return next((kind for kind in _kinds(PretrainedModel) if names <= _field_names(kind.config_class)), None)


def _kinds(base: type[PretrainedModel]) -> Iterator[type[PretrainedModel]]:
    """The classes below one that have a config."""
    for kind in base.__subclasses__():
        if "config_class" in vars(kind):
            yield kind
        yield from _kinds(kind)


def with_article(name: str) -> str:
    """A class with the article that goes with it: an Infinity, a VAR."""
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _is_of(config: Path, config_class: type) -> bool:
    kind = saved_class(config)
    return kind is not None and kind.config_class is config_class


def _field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def load_config(config_class: type, path: Path) -> Any:
    """Read a dataclass from a JSON file.

    Raises:
        ValueError: a damaged file, a field that the dataclass does not have, values that make no sense.
    """
    values = read_json_object(path, config_class.__name__)
    unknown = sorted(set(values) - _field_names(config_class))
    if unknown:
        kind = saved_class(path)
        if kind is not None:
            inside = [other for other in sorted(path.parent.glob(f"*/{CONFIG_NAME}")) if _is_of(other, config_class)]
            hint = f", which has its own in {inside[0].parent}" if inside else ""
            wanted = config_class.__name__.removesuffix("Config")
            raise ValueError(
                f"from_pretrained: expected {with_article(wanted)}, got {with_article(kind.__name__)} in "
                f"{path.parent}{hint}"
            )
        raise ValueError(f"{config_class.__name__}: {path}: unknown fields {unknown}")
    try:
        return config_class(**{name: fitted(config_class, name, value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_class.__name__}: {path}: {error}") from error


def load_strictly(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    source: str,
    describe: Callable[[str], str] = str,
    *,
    prefix: str = "",
    assign: bool = False,
) -> None:
    """Load a state dict that must fit exactly.

    Args:
        model: what to load.
        state: its state dict.
        source: where it came from, for the message.
        describe: from a key to the name that the user knows it by.
        prefix: of these names.
        assign: take the tensors themselves, with their dtypes, rather than copies; for a model on the device "meta".

    Raises:
        ValueError: names every missing and unexpected key and every wrong shape.
    """

    def name_of(key: str) -> str:
        return prefix + describe(key)

    own = model.state_dict()
    problems = [f"missing key {name_of(name)}" for name in sorted(set(own) - set(state))]
    problems += [f"unexpected key {name_of(name)}" for name in sorted(set(state) - set(own))]
    problems += [
        f"{name_of(name)}: expected shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
        for name in sorted(set(own) & set(state))
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise ValueError(f"{type(model).__name__}: cannot load {source}:\n  " + "\n  ".join(problems))
    model.load_state_dict(state, assign=assign)


def has_model(model_id: str, subfolder: str, **hub: Any) -> bool:
    """Whether a folder or a repository of the hub keeps a model in a subfolder; arguments as `from_pretrained`."""
    try:
        _file(model_id, subfolder, CONFIG_NAME, **hub)
    except LocalEntryNotFoundError:  # offline: nobody knows what the repository has
        raise
    except (FileNotFoundError, EntryNotFoundError):
        return False
    return True


def _file(model_id: str, subfolder: str, name: str, **hub: Any) -> str:
    if os.path.isdir(model_id):
        path = os.path.join(model_id, subfolder, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"from_pretrained: no such file: {path}")
        return path
    return hf_hub_download(model_id, name, subfolder=subfolder or None, **hub)
