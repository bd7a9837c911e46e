"""What commands share: saved models, devices, checks of options."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from fastvar.ranges import OneOf

if TYPE_CHECKING:
    import torch

    from fastvar.models import VAR, Model, TextEncoder, VARConfig
    from fastvar.models.pretrained import PretrainedModel

Kind = TypeVar("Kind", bound="PretrainedModel")
Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class ModelOptions:
    """A VAR or an Infinity."""

    model: Path
    """Folder of the model, or of the run that trained it; or public weights of an Infinity."""
    tokenizer: Path | None = None
    """Infinity: the tokenizer's file or folder, if the model was not saved with it."""
    text_encoder: str = ""
    """Infinity: what reads the prompts, as in `fastvar train`; by default what the model was trained with."""
    grids: str = ""
    """Infinity: token grids, which decide the size of the images, or a preset such as "infinity-0.25M-1.500" (pixels
    and height / width); by default the model's own."""

    def load(self, device: str | None, *, read_on: str | None = None) -> Model:
        """The model with its tokenizer, on a device; by default on the GPU if there is one. `read_on` is the device of
        its text encoder, by default the same.

        Raises:
            FileNotFoundError: no model in that folder.
            ValueError: another model, one without a tokenizer or a text encoder, a device that is not here.
        """
        from fastvar.cli.infinity import is_infinity, load_with_encoder
        from fastvar.schedule import ScaleSchedule

        if is_infinity(self.model):
            place, reader = chosen_device(device), chosen_device(device if read_on is None else read_on)
            schedule = ScaleSchedule.parse(self.grids) if self.grids else None
            return load_with_encoder(self.model, self.tokenizer, self.text_encoder, reader, schedule).to(place)
        for option in fields(self):
            if option.name != "model" and getattr(self, option.name):
                raise ValueError(f"{option.name}: expected none with a VAR, as it has no such option")
        return load_model(self.model, device=device)


@dataclass(frozen=True)
class DrawnWith(ModelOptions):
    """A VAR or an Infinity to draw with, where there may be none."""

    model: Path | None = None  # type: ignore[assignment]
    """Folder of the model, or of the run that trained it; or public weights of an Infinity."""
    dtype: Annotated[str, OneOf("", "float32", "bfloat16")] = ""
    """Infinity: "float32" or "bfloat16" for the weights; by default as they were saved."""

    def load(self, device: str | None, *, read_on: str | None = None) -> Model:
        import torch

        model = super().load(device, read_on=read_on)
        return model.to(getattr(torch, self.dtype)) if self.dtype else model


def load_model(folder: Path, *, device: str | None = None) -> VAR:
    """A saved VAR with its tokenizer, on a device; by default on the GPU if there is one.

    Raises:
        FileNotFoundError: no model in that folder.
        ValueError: another model, one that was saved without its tokenizer, a device that is not here.
    """
    from fastvar.models import VAR

    place = chosen_device(device)
    var = load_saved("model", VAR, folder)
    if not var.has_tokenizer:
        raise ValueError(f"model: expected a VAR that was saved with its tokenizer, got {folder}")
    return var.to(place)


def load_saved(option: str, kind: type[Kind], folder: Path) -> Kind:
    """A model from its folder, or from that of the run which trained it.

    Raises:
        FileNotFoundError: no model in that folder.
        ValueError: another model, a damaged one.
    """
    if not any((place / "config.json").is_file() for place in (folder, folder / "model")):
        unfinished = (folder / "settings.json").is_file()
        hint = "; that run has no model yet: the command that began it goes on with it" if unfinished else ""
        raise FileNotFoundError(f"{option}: expected a folder with config.json, got {folder}{hint}")
    try:
        return kind.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error


def load_encoder(name: str, **options: Any) -> TextEncoder:
    """As `load_text_encoder`, with a T5's folder by its absolute path, so that features and runs know it from wherever
    a command is called."""
    from fastvar.models import T5TextEncoder, load_text_encoder

    encoder = load_text_encoder(name, **options)
    if isinstance(encoder, T5TextEncoder) and Path(name).is_dir():
        encoder.name = str(Path(name).resolve())
    return encoder


def chosen_device(name: str | None) -> torch.device:
    """The device of a name such as "cuda:1"; without one the GPU, if there is one."""
    import torch

    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is not None and name not in here:
        raise ValueError(f"device: expected one of {', '.join(here)}, got {name!r}")
    return torch.device(name or ("cuda" if "cuda" in here else "cpu"))


def device_of_process(name: str | None) -> str:
    """The device that a process of training has, of a name as `train_on` takes it."""
    device = chosen_device(name)
    if device.type == "cpu" or device.index is not None:
        return str(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def train_on(name: str | None) -> None:
    """Make accelerate train on a device; without a name it takes the GPUs, if there are any."""
    import torch

    device = chosen_device(name)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif device.index is not None:
        if "LOCAL_RANK" in os.environ:
            raise ValueError(f"device: expected cpu or cuda where several processes have a GPU each, got {name!r}")
        torch.cuda.set_device(device)


def class_index(option: str, label: str, config: VARConfig) -> int:
    """The class that a label names, or counts from 0."""
    try:
        return config.class_index(label)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
