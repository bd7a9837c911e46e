"""Pictures of subjects: references as models take them, and pairs of a target with its text and its references."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvar.data.folder import image_transform, images_below
from fastvar.data.text_images import BadItem, nearest_size, refuse
from fastvar.files import read_text
from fastvar.pictures import picture_size, read_picture

_OWNER = "SubjectPairs: source"
REFERENCES = "references"  # the folder of a subject's references


class Pair(NamedTuple):
    """A target, its text and one or several references of the subject that it shows."""

    image: Path
    text: str
    references: tuple[Path, ...]


def read_references(photos: Sequence[Path], size: tuple[int, int], owner: str) -> Tensor:
    """Photos of a subject as its references (R, 3, H, W) float32 in [-1, 1], resized (bicubic, antialiased) until they
    cover the size and cropped at the centre.

    Raises:
        ValueError: no photo, a file that is none; names it. owner: "class: argument", as it opens the message.
    """
    if not photos:
        raise ValueError(f"{owner}: expected at least one photo, got none")
    transform = image_transform(size, train=False, margin=1.0)
    return torch.stack([transform(read_picture(photo, owner)) for photo in photos])


def is_pairs(source: str | Path) -> bool:
    """Whether a source is one of `SubjectPairs` and not of images with texts alone: its first line names references, or
    there is a folder of references in it."""
    path = Path(source)
    if path.is_dir():
        return next(path.glob(f"*/{REFERENCES}"), None) is not None
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return '"references"' in next((line for line in file if line.strip()), "")


def find_pairs(source: str | Path, *, skip_bad: bool = False) -> list[Pair]:
    """The pairs of a source, in the order of the file or of the paths.

    Args:
        source: a .jsonl, each line of which is an object with "image" and "text", and under "references" a list of
            paths; paths are as seen from the file's folder. Or a folder with a subfolder for each subject: the images
            in its folder "references" are the references, all others are targets, each beside a .txt of its name.
        skip_bad: leave out what is not whole, with a warning, instead of stopping.

    Raises:
        ValueError: nothing there, targets without a text or without references; names some.
    """
    path = Path(source)
    if not path.is_dir() and path.suffix != ".jsonl":
        raise ValueError(f"{_OWNER}: expected a folder or a .jsonl, got {source}")
    found, bad = list[Pair](), list[BadItem]()
    for item in _of_folder(path) if path.is_dir() else _of_lines(path):
        if isinstance(item, Pair):
            found.append(item)
        else:
            bad.append(item)
    refuse(_OWNER, "targets with a text and references", bad, skip_bad)
    if not found:
        raise ValueError(f"{_OWNER}: expected targets with a text and references, got none in {source}")
    return found


def _of_lines(path: Path) -> Iterator[Pair | BadItem]:
    for number, line in enumerate(read_text(path, _OWNER).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            references = tuple(path.parent / name for name in entry["references"])
            pair = Pair(path.parent / entry["image"], entry["text"].strip(), references)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            yield BadItem(f"{path}, line {number}", 'no object with "image", "text" and a list "references"')
            continue
        yield pair if references else BadItem(f"{path}, line {number}", "no references")


def _of_folder(root: Path) -> Iterator[Pair | BadItem]:
    for subject in sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith(".")):
        references = tuple(images_below(subject / REFERENCES))
        for image in images_below(subject):
            if image.relative_to(subject).parts[0] == REFERENCES:
                continue
            caption = image.with_suffix(".txt")
            if not caption.is_file() or not references:
                yield BadItem(str(image), "no references" if caption.is_file() else f"{caption.name} is missing")
            else:
                yield Pair(image, read_text(caption, _OWNER).strip(), references)


class SubjectPairs(Dataset[dict[str, Any]]):
    """Targets with texts and references of their subjects, for models with a subject prefix.

    A target is resized until it covers the size whose ratio is nearest and cropped at the centre, its reference the
    same way to the same size. Of several references one is drawn each time the target is, from torch's global state,
    which in training follows from the run's seed and the sample's position: a model learns from all of them, with a
    prefix as long as that of one.

    Args:
        source: see `find_pairs`.
        sizes: (H, W) in pixels, each a bucket, as in `TextImages`.
        skip_bad: leave out what cannot be taken, with a warning, instead of stopping.

    Attributes:
        items: the pairs, see `Pair`.
        buckets: for each the index of its size.

    An item is a dict: image (3, H, W) float32 in [-1, 1]; text str; reference, as the image.

    Raises:
        ValueError: as `find_pairs`; a target that is no picture. When an item is read, a damaged picture, by its name.
    """

    def __init__(self, source: str | Path, *, sizes: Sequence[tuple[int, int]], skip_bad: bool = False) -> None:
        self.sizes = tuple((height, width) for height, width in sizes)
        self.items, self.buckets, bad = list[Pair](), list[int](), list[BadItem]()
        for item in find_pairs(source, skip_bad=skip_bad):
            try:
                height, width = picture_size(item.image)
                for reference in item.references:
                    picture_size(reference)
            except Exception as error:  # what a damaged file makes of Pillow is anything
                bad.append(BadItem(str(item.image), f"no readable image or reference ({error})"))
                continue
            self.items.append(item)
            self.buckets.append(nearest_size(height, width, self.sizes))
        refuse(_OWNER, "targets with a text and references", bad, skip_bad)
        self._transforms = [image_transform(size, train=False, margin=1.0) for size in self.sizes]
        told = "\0".join(f"{item.image.name}\0{item.text}\0{len(item.references)}" for item in self.items)
        self.checksum = crc32(told.encode("utf-8", "replace"))

    @property
    def texts(self) -> list[str]:
        """The text of each item."""
        return [item.text for item in self.items]

    @property
    def text_length(self) -> int:
        """The most characters of a text, for a VAR, which reads its texts by characters."""
        return max(map(len, self.texts))

    @property
    def alphabet(self) -> str:
        """The characters of all texts, for a VAR."""
        return "".join(sorted(set("".join(self.texts))))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, size = self.items[index], self.sizes[self.buckets[index]]
        chosen = int(torch.randint(len(item.references), ()))
        return {
            "image": self._transforms[self.buckets[index]](read_picture(item.image, _OWNER)),
            "text": item.text,
            "reference": read_references(item.references[chosen : chosen + 1], size, _OWNER)[0],
        }
