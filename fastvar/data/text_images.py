"""Images with a text each: folders, lists in JSON lines or tars, in buckets by the ratio of height to width."""

from __future__ import annotations

import glob
import io
import json
import logging
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zlib import crc32

from torch.utils.data import Dataset

from fastvar.data.folder import EXTENSIONS, image_transform, images_below
from fastvar.data.prompt_sets import quoted_texts
from fastvar.data.regions import with_regions
from fastvar.files import read_text
from fastvar.pictures import picture_size, read_picture

logger = logging.getLogger("fastvar")

_NAMED = 5  # how many bad items an error names
_OWNER = "TextImages: source"


class TextImage(NamedTuple):
    """Where an image is, and its text.

    Attributes:
        name: of the image: its path, or "TAR: NAME".
        path: the file that has it.
        place: (start, length) of its bytes in that file; None for all of them.
        text: the text.
        regions: of text in the image: its boxes where a list has them, else the texts that are quoted in its text.
    """

    name: str
    path: Path
    place: tuple[int, int] | None
    text: str
    regions: int

    def open(self) -> Path | io.BytesIO:
        """What Pillow reads."""
        if self.place is None:
            return self.path
        start, length = self.place
        with self.path.open("rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(length))


class BadItem(NamedTuple):
    """An image that cannot be taken.

    Attributes:
        name: as `TextImage`.
        reason: why.
    """

    name: str
    reason: str


def find_text_images(source: str | Path, *, skip_bad: bool = False) -> list[TextImage]:
    """The images of a source that have a text: of a folder in the order of their paths, of other files in the
    order in which they have them, one tar after the other by name.

    Args:
        source: a folder of images, each beside a file of its name that ends in .txt (searched for in depth; a folder
            that has tars instead is one of shards); a .jsonl, each line of which is an object with "image", a path as
            seen from the file's folder, "text", and perhaps "boxes", a list with a box for each region of text; or one
            tar or a pattern ("shards/*.tar") of tars, not compressed, in which NAME.jpg (or .png and so on) and
            NAME.txt belong together. Images of one name and several endings have one text. All texts are in UTF-8;
            white space around them is left out.
        skip_bad: leave out images without a text in UTF-8 and lines that say nothing, with a warning, instead of
            stopping.

    Raises:
        ValueError: no such source, nothing in it, or images without a text, of which it names some.
    """
    found, bad = list[TextImage](), list[BadItem]()
    for item in _items(str(source)):
        if isinstance(item, TextImage):
            found.append(item)
        else:
            bad.append(item)
    refuse(_OWNER, "images with a text each", bad, skip_bad)
    if not found:
        raise ValueError(f"{_OWNER}: expected images with texts, got none in {source}")
    return found


def refuse(owner: str, expected: str, bad: Sequence[BadItem], skip_bad: bool) -> None:
    """Raise a ValueError that names some of what cannot be taken, or, to be left out, warn of it. owner: "class:
    argument", as it opens the message; expected: what all should have been."""
    if not bad:
        return
    named = "; ".join(f"{item.name}: {item.reason}" for item in bad[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    if not skip_bad:
        raise ValueError(f"{owner}: expected {expected}, got {len(bad)} others: {named}{more}")
    logger.warning("%s: %d images are left out: %s%s", owner, len(bad), named, more)


def _items(source: str) -> Iterator[TextImage | BadItem]:
    path = Path(source)
    if path.is_dir():
        images = images_below(path)
        tars = [] if images else sorted(path.glob("*.tar"))
        for image in images:
            yield _beside(image)
    elif path.suffix == ".jsonl":
        tars = []
        yield from _listed(path)
    else:
        tars = [Path(name) for name in sorted(glob.glob(source))] or [path]
    for tar in tars:
        yield from _in_tar(tar)


def _beside(image: Path) -> TextImage | BadItem:
    caption = image.with_suffix(".txt")
    if not caption.is_file():
        return BadItem(str(image), f"{caption.name} is missing")
    try:
        return _text_image(str(image), image, None, read_text(caption, _OWNER).strip())
    except (ValueError, OSError) as error:
        return BadItem(str(image), str(error))


def _listed(path: Path) -> Iterator[TextImage | BadItem]:
    for number, line in enumerate(read_text(path, _OWNER).split("\n"), 1):  # not splitlines: a text may have U+2028
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text, boxes = path.parent / entry["image"], entry["text"].strip(), entry.get("boxes")
            regions = None if boxes is None else len(boxes)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            yield BadItem(f"{path}, line {number}", 'it is no object with texts under "image" and "text"')
            continue
        yield _text_image(str(image), image, None, text, regions)


def _in_tar(path: Path) -> Iterator[TextImage | BadItem]:
    """By the tar's own index, which is read once; images are read where they lie."""
    if path.suffix != ".tar" or not path.is_file():
        raise ValueError(f"{_OWNER}: expected a folder, a .jsonl or tars, got {path}")
    images, texts = dict[str, tarfile.TarInfo](), dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isreg() or member.issparse() or name.name.startswith("."):
                    continue
                if name.suffix.lower() in EXTENSIONS:
                    images[str(name)] = member
                elif name.suffix.lower() == ".txt":
                    data = tar.extractfile(member)
                    assert data is not None  # it is a file
                    texts[str(name.with_suffix(""))] = data.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{_OWNER}: expected a tar that is not compressed, got {path} ({error})") from error
    for member in images.values():
        shown, key = f"{path}: {member.name}", str(PurePosixPath(member.name).with_suffix(""))
        if key not in texts:
            yield BadItem(shown, f"{key}.txt is missing")
            continue
        try:
            text = texts[key].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            yield BadItem(shown, f"expected text in UTF-8, got {key}.txt ({error.reason})")
            continue
        yield _text_image(shown, path, (member.offset_data, member.size), text)


def _text_image(
    name: str, path: Path, place: tuple[int, int] | None, text: str, regions: int | None = None
) -> TextImage:
    return TextImage(name, path, place, text, len(quoted_texts(text)) if regions is None else regions)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Which of the sizes (H, W) has the ratio of height to width that is nearest to a picture's; the first of equal
    ones."""
    ratio = math.log(height / width)
    return min(range(len(sizes)), key=lambda i: abs(ratio - math.log(sizes[i][0] / sizes[i][1])))


class TextImages(Dataset[dict[str, Any]]):
    """Images with texts, each resized to the size whose ratio of height to width is nearest to its own.

    An image is resized (bicubic, antialiased) until it covers that size and cropped at the centre. At the start all
    texts are read, and of each picture the head, which says how large it is. For training,
    `fastvar.training` draws batches of one size each by `buckets`.

    Args:
        source: see `find_text_images`.
        sizes: (H, W) in pixels, each a bucket. The nearest ratio is that of the least difference of logarithms, the
            first of equal ones.
        skip_bad: leave out what cannot be taken, with a warning, instead of stopping: images without a text, and files
            whose head is none of a picture.
        regions: take only images with so many regions of text, bins as `fastvar.data.regions` has them; all by default.

    Attributes:
        items: the images, see `TextImage`.
        buckets: for each the index of its size.

    An item is a dict: image (3, H, W) float32 in [-1, 1]; text str.

    Raises:
        ValueError: as `find_text_images`; sizes that are none. When an item is read, a damaged picture, by its name.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        sizes: Sequence[tuple[int, int]],
        skip_bad: bool = False,
        regions: Sequence[int] = (),
    ) -> None:
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f"TextImages: sizes: expected pairs (height, width) of pixels, got {sizes!r}")
        self.sizes = tuple((height, width) for height, width in sizes)
        self.items, self.buckets, bad = list[TextImage](), list[int](), list[BadItem]()
        self.regions = tuple(regions)
        found = find_text_images(source, skip_bad=skip_bad)
        if regions:
            found = [found[i] for i in with_regions([item.regions for item in found], regions)]
        for item in found:
            try:
                height, width = picture_size(item.open())
            except Exception as error:  # what a damaged file makes of Pillow is anything
                bad.append(BadItem(item.name, f"no readable image ({error})"))
                continue
            self.items.append(item)
            self.buckets.append(nearest_size(height, width, self.sizes))
        refuse(_OWNER, "images with a text each", bad, skip_bad)
        if not self.items:
            raise ValueError(f"{_OWNER}: expected images with texts, got none in {source}")
        self._transforms = [image_transform(size, train=False, margin=1.0) for size in self.sizes]
        told = "\0".join(part for item in self.items for part in (Path(item.name).name, item.text))
        self.checksum = crc32(told.encode("utf-8", "replace"))

    @property
    def texts(self) -> list[str]:
        """The text of each item."""
        return [item.text for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture = read_picture(item.open(), _OWNER, name=item.name)
        return {"image": self._transforms[self.buckets[index]](picture), "text": item.text}
