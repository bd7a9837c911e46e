"""A folder of images as a dataset, with or without class subfolders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvar.installation import install_command
from fastvar.pictures import read_picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's
_MARGIN = 1.125  # how much larger than the crop an image is resized, as VAR does


class ImageFolder(Dataset[dict[str, Any]]):
    """Images below a folder. Class subfolders give the labels, sorted by name; without any, every label is 0.

    Files are ordered by class, then by path, and searched for in depth; names that begin with a dot are skipped. For
    training, images are resized (bicubic, antialiased) to cover 1.125 times the size, cropped at random and flipped
    with probability 1/2, drawn from torch's global state as torchvision does; otherwise cropped at the centre. In
    training, what a transform draws from the global states of torch, NumPy and `random` follows from the run's seed.

    Args:
        root: the folder.
        size: (H, W) or one int, pixels.
        train: random crop and flip, or centre crop.
        flip: allow flips in training; turn it off for text.
        classes: the names of the classes in the order of their labels, as a model has them; by default those of the
            subfolders. A class may have no images here.
        transform: instead of all this: from a PIL RGB image to a (3, H, W) tensor.

    An item is a dict: image (3, H, W) float32 in [-1, 1]; label int64; path str.

    Raises:
        ValueError: no such folder, no images in it, images both beside and inside subfolders, a subfolder that is no
            class; when an item is read, a
            file that `fastvar.pictures.read_picture` refuses or the transform fails on (the message names it).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int | Sequence[int],
        train: bool = True,
        flip: bool = True,
        classes: Sequence[str] | None = None,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"ImageFolder: size: expected a positive int or (height, width), got {size!r}")
        self.root = Path(root)
        self.size: tuple[int, int] = (sides[0], sides[1])
        self.classes, self.samples = _find(self.root, classes)
        self.transform = transform if transform is not None else image_transform(self.size, train=train, flip=flip)

    @property
    def num_classes(self) -> int:
        """Number of classes: those that were named, else of class subfolders, or 1."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        picture = read_picture(path, "ImageFolder: root")
        try:
            image = self.transform(picture)
        except Exception as error:
            raise ValueError(f"ImageFolder: transform: {type(error).__name__} on {path} ({error})") from error
        return {"image": image, "label": torch.tensor(label), "path": str(path)}


class _Cover:
    """Resize a PIL image, aspect kept, to the least size that covers (H, W); one that has that size stays as it is."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        width, height = image.size
        factor = max(self.size[0] / height, self.size[1] / width)
        target = [max(round(height * factor), self.size[0]), max(round(width * factor), self.size[1])]
        return resize(image, target, interpolation=InterpolationMode.BICUBIC, antialias=True)


def image_transform(
    size: tuple[int, int], *, train: bool, flip: bool = True, margin: float = _MARGIN
) -> Callable[[Any], Tensor]:
    """From a PIL RGB image to a (3, H, W) float32 tensor in [-1, 1]; see `ImageFolder`. `margin`: how much larger than
    the crop it is resized.

    Raises ImportError, with the remedy, if torchvision is missing.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(f"image folders need torchvision: {install_command('train')}") from error
    crop = v2.RandomCrop(size) if train else v2.CenterCrop(size)
    flips = [v2.RandomHorizontalFlip()] if train and flip else []
    return v2.Compose(
        [
            _Cover((round(margin * size[0]), round(margin * size[1]))),
            crop,
            *flips,
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        ]
    )


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it, sorted; names that begin with a dot are skipped."""
    images = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            Path(parent, name) for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(images)


def _find(root: Path, wanted: Sequence[str] | None) -> tuple[list[str], list[tuple[Path, int]]]:
    """The class names and the (path, label) of every image."""
    if not root.is_dir():
        raise ValueError(f"ImageFolder: root: expected a folder, got {root}")
    images = images_below(root)
    if not images:
        raise ValueError(f"ImageFolder: root: expected images ({', '.join(EXTENSIONS)}), got none below {root}")
    beside = [path for path in images if path.parent == root]
    if len(beside) == len(images):
        if wanted is not None:
            raise ValueError(f"ImageFolder: classes: expected class subfolders in {root}, got images beside each other")
        return [""], [(path, 0) for path in images]
    if beside:
        raise ValueError(
            f"ImageFolder: root: expected images either beside or inside subfolders, got both: {beside[0]} and "
            f"{len(images) - len(beside)} in subfolders of {root}"
        )
    classes = sorted({path.relative_to(root).parts[0] for path in images})
    if wanted is not None:
        unknown = [name for name in classes if name not in set(wanted)]
        if unknown:
            raise ValueError(
                f"ImageFolder: classes: expected subfolders of {root} out of {len(wanted)} classes "
                f"({', '.join(wanted[:10])}{', ...' if len(wanted) > 10 else ''}), got {', '.join(unknown)}"
            )
        classes = list(wanted)
    labels = {name: label for label, name in enumerate(classes)}
    # Sorted by class before path: "a" before "a-b", though "a-b/x" sorts before "a/x" as text.
    samples = sorted((labels[path.relative_to(root).parts[0]], path) for path in images)
    return classes, [(path, label) for label, path in samples]
