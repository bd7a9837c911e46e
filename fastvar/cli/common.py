"""What commands share: data sets, saved models, checks of options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvar.ranges import Count, OneOf

if TYPE_CHECKING:
    from fastvar.models import VAR

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str = "handwriting"
    """"handwriting" (scenes of scanned digits, no download) or a folder of images, one subfolder per class."""
    scenes: Count = 16000
    """Handwriting: number of scenes."""
    digits: Count = 2
    """Handwriting: digits of each number."""
    reference_place: Annotated[str, OneOf("own", "scene")] = "own"
    """Handwriting: where a reference shows its digit, at a place of its "own" or as in the "scene", which is easier."""
    flip: bool = True
    """Folder: mirror images at random; switch it off for text."""

    def load(self, size: tuple[int, int], *, train: bool, seed: int) -> Any:
        """The data set at an image size (height, width)."""
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
        return ImageFolder(self.data, size=size, train=train, flip=self.flip)


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


def saved(option: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{option}: expected a folder with config.json, got {folder}")
    return str(folder)
