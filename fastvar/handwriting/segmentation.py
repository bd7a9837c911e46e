"""Finding ink: paper colour, ink mask, connected components, and the characters that they make up.

Classical document analysis: distance from the paper's colour, Otsu's threshold (IEEE Trans. SMC 9, 1979), components
with 8-connectivity, fragments that overlap horizontally joined, specks dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 64
MIN_CONTRAST = 0.16  # least distance of mean ink from mean paper (RGB root mean square); below, the page is empty
# Otsu's between-class share of the variance: real pages stay above even when blurred; clouds, noise (about 2/3) and
# smooth gradients (3/4) do not.
MIN_SEPARABILITY = 0.755
MAX_INK = 0.6  # of the page; above, "paper" is not what surrounds the ink
MIN_HEIGHT = 0.14  # of the page's shorter side: a character is at least so high
MAX_EXTENT = 0.95  # of the page, either way: what spans it is no character
SPECK = 0.15  # of the page's largest component's area: below, a component is no character of its own
OVERLAP = 0.5  # of the narrower one's width: from there two components are one character,
MAX_GAP = 0.1  # of the page's height: unless they are farther apart
WORKING_SIDE = 64  # pages are averaged down until their shorter side is below twice this

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pages:
    """B segmented images of h x w working pixels and their M characters, ordered by page, then left to right.

    pixels: (B, 3, h, w) float32 in [0, 1]; strength: (B, h, w) float32, 0 on paper and about 1 on ink;
    labels: (B, h, w) int32, component of each pixel, 0 = paper; owner: (components + 1,) int64, the character of each
    component or -1; page: (M,) int64; boxes: (M, 4) int64, x0, y0, x1, y1 in working pixels; scale: image pixels per
    working pixel; areas: (M,) int64, pixels of ink; ink: (B,) int64, pixels of ink of each page, characters or not.
    """

    pixels: NDArray[np.float32]
    strength: NDArray[np.float32]
    labels: NDArray[np.int32]
    owner: NDArray[np.int64]
    page: NDArray[np.int64]
    boxes: NDArray[np.int64]
    scale: int
    areas: NDArray[np.int64]
    ink: NDArray[np.int64]

    def image_boxes(self) -> NDArray[np.float32]:
        """(M, 4) float32 boxes in pixels of the images as they were given."""
        return (self.boxes * self.scale).astype(np.float32)

    def of_page(self, page: int) -> slice:
        """Where the characters of one page stand."""
        start, stop = np.searchsorted(self.page, [page, page + 1])
        return slice(int(start), int(stop))

    def crops(self, side: int, border: int, deslant: bool = True) -> NDArray[np.float32]:
        """Each character alone, (M, side, side) float32 in [0, 1]: aspect kept, centred, `border` pixels free.

        deslant: undo the slant that second moments of the ink show (cov(x, y) / var(y)).
        """
        slant = self._slants() if deslant else np.zeros(len(self.page))
        left, top, right, bottom = self._extents(slant).T
        step = np.maximum(right - left, bottom - top) / (side - 2 * border)  # working pixels per pixel of the crop
        offset = (np.arange(side) + 0.5 - side / 2)[None, :] * step[:, None]
        y = (top + bottom)[:, None] / 2 + offset  # [M, side]
        middle = self.boxes[:, 1::2].sum(axis=1)[:, None] / 2
        # [M, side, side]
        x = ((left + right)[:, None] / 2 + offset)[:, None, :] + (slant[:, None] * (y - middle))[:, :, None] - 0.5
        y = np.broadcast_to((y - 0.5)[:, :, None], x.shape)
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        part_x, part_y = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
        _, height, width = self.labels.shape
        page = self.page[:, None, None]
        character = np.arange(len(self.page))[:, None, None]
        labels, strength = self.labels.reshape(-1), self.strength.reshape(-1)

        def corner(dx: int, dy: int) -> NDArray[np.float32]:
            column, row = x0 + dx, y0 + dy
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = (page * height + np.clip(row, 0, height - 1)) * width + np.clip(column, 0, width - 1)
            label = labels[pixel]
            # Another character's ink is paper here; paper's own pixels keep their faint edge of ink.
            return np.where(inside & ((label == 0) | (self.owner[label] == character)), strength[pixel], 0)

        upper = corner(0, 0) * (1 - part_x) + corner(1, 0) * part_x
        lower = corner(0, 1) * (1 - part_x) + corner(1, 1) * part_x
        return upper * (1 - part_y) + lower * part_y

    def _ink(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The character, page, row and column of every pixel of ink that is read."""
        owner = self.owner[self.labels]
        page, y, x = np.nonzero(owner >= 0)
        return owner[page, y, x], page, y, x

    def _slants(self) -> NDArray[np.float64]:
        """(M,) horizontal shift per row downwards, within +-0.6."""
        character, page, y, x = self._ink()
        count = len(self.page)
        weight = self.strength[page, y, x].astype(np.float64)
        total = np.bincount(character, weight, count)
        mean_x = np.bincount(character, weight * x, count) / total
        mean_y = np.bincount(character, weight * y, count) / total
        dx, dy = x - mean_x[character], y - mean_y[character]
        covariance = np.bincount(character, weight * dx * dy, count)
        variance = np.bincount(character, weight * dy * dy, count)
        return np.clip(covariance / (variance + total), -0.6, 0.6)

    def _extents(self, slant: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, 4) x0, y0, x1, y1 of the ink after undoing `slant` about the middle row of each box."""
        character, _, y, x = self._ink()
        boxes = self.boxes.astype(np.float64)
        straight = x + 0.5 - slant[character] * (y + 0.5 - (boxes[:, 1] + boxes[:, 3])[character] / 2)
        np.minimum.at(left := np.full(len(boxes), np.inf), character, straight - 0.5)
        np.maximum.at(right := np.full(len(boxes), -np.inf), character, straight + 0.5)
        return np.stack([left, boxes[:, 1], right, boxes[:, 3]], axis=1)

    def ink_colours(self) -> NDArray[np.float32]:
        """(M, 3) float32 in [0, 1]: each character's colour, averaged over its strongest pixels."""
        character, page, y, x = self._ink()
        # The fourth power lets the core of a stroke speak, not its edge, where ink and paper mix.
        weight = self.strength[page, y, x].astype(np.float64) ** 4
        count = len(self.page)
        total = np.bincount(character, weight, count)
        colours = [np.bincount(character, weight * self.pixels[page, c, y, x], count) for c in range(3)]
        return (np.stack(colours, axis=1) / np.maximum(total, 1e-9)[:, None]).astype(np.float32)


def _otsu(distance: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Otsu's threshold, the distance of the two class means, and the separability in 0..1: each (B,).

    distance: (B, h w) >= 0. Separability is the share of the variance that lies between the classes.
    """
    pages = len(distance)
    top = np.maximum(distance.max(axis=1), 1e-6)
    bins = np.minimum((distance * (BINS / top)[:, None]).astype(np.int64), BINS - 1)
    flat = (bins + np.arange(pages)[:, None] * BINS).ravel()
    histogram = np.bincount(flat, minlength=pages * BINS).reshape(pages, BINS) / distance.shape[1]
    centre = (np.arange(BINS) + 0.5) / BINS
    below = histogram.cumsum(axis=1)
    moment = (histogram * centre).cumsum(axis=1)
    above = 1 - below
    gap = (moment[:, -1:] - moment) / np.maximum(above, 1e-9) - moment / np.maximum(below, 1e-9)
    between = np.where((below > 1e-9) & (above > 1e-9), below * above * gap**2, 0)
    # A plateau (no pixel between the classes) is cut in its middle.
    best = between.max(axis=1, keepdims=True)
    ties = between >= best * (1 - 1e-9)
    cut = (ties * np.arange(BINS)).sum(axis=1) / ties.sum(axis=1)
    nearest = np.round(cut).astype(np.int64)
    contrast = np.where(best[:, 0] > 0, gap[np.arange(pages), nearest], 0) * top
    separability = best[:, 0] * top**2 / np.maximum(distance.var(axis=1), 1e-9)
    return (cut + 1) / BINS * top, contrast, separability


def _join(boxes: list[Box], areas: list[int], height: int, width: int) -> list[list[int]]:
    """Group one page's components into characters, left to right; groups that are specks are left out.

    boxes: x0, y0, x1, y1 in working pixels; areas: pixels.
    """
    largest = max(areas)
    groups: list[tuple[list[int], list[int]]] = []  # the components and the box of each
    for index in sorted(range(len(boxes)), key=lambda i: -areas[i]):
        x0, y0, x1, y1 = boxes[index]
        home = None
        for members, box in groups:
            shared = min(x1, box[2]) - max(x0, box[0])
            apart = max(y0, box[1]) - min(y1, box[3])
            narrower = min(x1 - x0, box[2] - box[0])
            if shared >= OVERLAP * narrower and apart <= MAX_GAP * height:
                home = (members, box)
                break
        if home is not None:
            members, box = home
            members.append(index)
            box[:] = [min(x0, box[0]), min(y0, box[1]), max(x1, box[2]), max(y1, box[3])]
        elif areas[index] >= SPECK * largest:
            groups.append(([index], [x0, y0, x1, y1]))
    kept = [
        (members, (x0 + x1) / 2)
        for members, (x0, y0, x1, y1) in groups
        if MIN_HEIGHT * min(height, width) <= y1 - y0 <= MAX_EXTENT * height and x1 - x0 <= MAX_EXTENT * width
    ]
    return [members for members, _ in sorted(kept, key=lambda group: group[1])]


def segment(images: Tensor) -> Pages:
    """Segment images (B, 3, H, W), floats in [0, 1] on any device, into characters. Never fails on odd content."""
    from scipy import ndimage

    pixels = images.detach().to("cpu", torch.float32)
    count, _, height, width = pixels.shape
    scale = max(min(height, width) // WORKING_SIDE, 1)
    if scale > 1:
        pixels = torch.nn.functional.avg_pool2d(pixels, scale)
    page = np.ascontiguousarray(pixels.numpy())
    _, _, height, width = page.shape
    frame = np.concatenate([page[:, :, 0], page[:, :, -1], page[:, :, :, 0], page[:, :, :, -1]], axis=2)
    paper = np.median(frame, axis=2)
    distance = np.sqrt(((page - paper[:, :, None, None]) ** 2).mean(axis=1))
    threshold, contrast, separability = _otsu(distance.reshape(count, height * width))
    ink = distance > threshold[:, None, None]
    written = (contrast >= MIN_CONTRAST) & (separability >= MIN_SEPARABILITY) & (ink.mean(axis=(1, 2)) <= MAX_INK)
    ink &= written[:, None, None]
    strength = np.clip(distance / np.maximum(contrast, 1e-6)[:, None, None], 0, 1).astype(np.float32)

    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True  # never from one page to the next
    labels, components = ndimage.label(ink, structure=neighbours)
    areas = np.bincount(labels.ravel(), minlength=components + 1)
    by_page: list[list[int]] = [[] for _ in range(count)]
    boxes: list[Box] = []
    objects = ndimage.find_objects(labels) if components else []  # it fails on an empty batch
    for component, (depth, rows, columns) in enumerate(objects):
        by_page[depth.start].append(component)
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))

    owner = np.full(components + 1, -1, dtype=np.int64)
    pages: list[int] = []
    joined: list[Box] = []
    read: list[int] = []
    for index, members in enumerate(by_page):
        if not members:
            continue
        sizes = [int(areas[component + 1]) for component in members]
        for group in _join([boxes[component] for component in members], sizes, height, width):
            parts = [boxes[members[i]] for i in group]
            for i in group:
                owner[members[i] + 1] = len(joined)
            x0, y0, x1, y1 = zip(*parts, strict=True)
            joined.append((min(x0), min(y0), max(x1), max(y1)))
            pages.append(index)
            read.append(sum(sizes[i] for i in group))
    return Pages(
        pixels=page,
        strength=strength,
        labels=labels,
        owner=owner,
        page=np.array(pages, dtype=np.int64),
        boxes=np.array(joined, dtype=np.int64).reshape(-1, 4),
        scale=scale,
        areas=np.array(read, dtype=np.int64),
        ink=ink.sum(axis=(1, 2)),
    )
