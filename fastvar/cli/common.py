"""What commands share: data sets, saved models, checks of options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from fastvar.data import HandwritingScenes, ImageFolder
    from fastvar.models import VAR, VARConfig

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str = "handwriting"
    """"handwriting" (scenes of scanned digits, no download) or a folder of images, one subfolder per class."""
    scenes: int = 16000
    """Handwriting: number of scenes."""
    digits: int = 2
    """Handwriting: digits of each number."""
    reference_place: str = "own"
    """Handwriting: where a reference shows its digit, at a place of its "own" or as in the "scene", which is easier."""
    flip: bool = True
    """Folder: mirror images at random; switch it off for text."""

    def load(
        self, size: tuple[int, int], *, train: bool, seed: int, classes: Sequence[str] | None = None
    ) -> HandwritingScenes | ImageFolder:
        """The data set at an image size (height, width).

        Args:
            classes: of a folder, see `ImageFolder`.
        """
        from fastvar.data import HandwritingScenes, ImageFolder

        if self.data == "handwriting":
            split = "train" if train else "test"
            return HandwritingScenes(
                length=self.scenes,
                size=size,
                digits=self.digits,
                split=split,
                seed=seed,
                reference_place=self.reference_place,
            )
        return ImageFolder(self.data, size=size, train=train, flip=self.flip, classes=classes)


def load_model(folder: Path, *, device: str | None = None) -> VAR:
    """A saved VAR with its tokenizer, on a device; by default on the GPU if there is one.

    Raises:
        FileNotFoundError: no model in that folder.
        RuntimeError: a model that was saved without its tokenizer.
    """
    import torch

    from fastvar.models import VAR

    var = VAR.from_pretrained(saved("model", folder))
    var.tokenizer  # noqa: B018  # raises if there is none
    return var.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def class_index(option: str, label: str, config: VARConfig) -> int:
    """The class that a label names, or counts from 0."""
    try:
        return config.class_index(label)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{option}: expected at least {least}, got {value}")


def saved(option: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{option}: expected a folder with config.json, got {folder}")
    return str(folder)
