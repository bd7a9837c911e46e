"""Drawing scanned digits: colours of ink and paper, layout of a word, and anti-aliased strokes, for whole batches.

Only correctly rounded operations (+ - * / and comparisons) are used, so that an item comes out bit-equal in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastvar.handwriting.scans import CELLS, FIELD_SIDE, PADDING, SAMPLES_PER_CELL, scan_fields

Floats = NDArray[np.float64]

MIN_CONTRAST = 0.4  # least luminance distance of ink and paper, on a scale where white is 1
MARGIN = 1.5  # pixels that stay free at every side
GAP = 2.0  # least pixels between two digits
READABLE = 1.1  # least pixels per cell of a scan (8 cells high) of a typical word; below, digits lose their shape
TYPICAL_WIDTH = 6.5  # cells, of a digit
MAX_HEIGHT = 0.74  # of the image
BOX_LEVEL = 0.15  # coverage from which a pixel counts as ink for a box
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Placement:
    """Where a word's digits lie. All (B, D) float64: centre of the scan in pixels, and pixels per cell."""

    x: Floats
    y: Floats
    scale: Floats


def most_digits(height: int, width: int) -> int:
    """How many digits a word of an image (pixels) may have and stay readable."""
    if MAX_HEIGHT * height / CELLS < READABLE:
        return 0
    return max(int((width - 2 * MARGIN + GAP) / (READABLE * TYPICAL_WIDTH + GAP)), 0)


def hsv_to_rgb(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """(B,) each in [0, 1] -> (B, 3)."""
    k = np.mod(np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None], 6)
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def luminance(rgb: Floats) -> Floats:
    """(B, 3) -> (B,): Rec. 601 luma of the encoded values, which is what a viewer's contrast follows."""
    return LUMA[0] * rgb[:, 0] + LUMA[1] * rgb[:, 1] + LUMA[2] * rgb[:, 2]


def _darken(rgb: Floats, ceiling: Floats) -> Floats:
    return rgb * np.minimum(1, ceiling / np.maximum(luminance(rgb), 1e-6))[:, None]


def _lighten(rgb: Floats, floor: Floats) -> Floats:
    return 1 - _darken(1 - rgb, 1 - floor)


def draw_paper(dark: NDArray[np.bool_], u: Floats) -> Floats:
    """Paper colours (B, 3) in [0, 1]: pastel, or deep where `dark`. u: (B, 3) uniform draws."""
    saturation = np.where(dark, 0.30 + 0.50 * u[:, 1], 0.02 + 0.26 * u[:, 1])
    value = np.where(dark, 0.12 + 0.22 * u[:, 2], 0.86 + 0.14 * u[:, 2])
    return hsv_to_rgb(u[:, 0], saturation, value)


def draw_ink(dark: NDArray[np.bool_], paper: Floats, u: Floats) -> Floats:
    """Ink colours (B, 3) at least MIN_CONTRAST from the paper: deep, or light where `dark`. u: (B, 3)."""
    saturation = np.where(dark, 0.75 * u[:, 1], 0.45 + 0.55 * u[:, 1])
    value = np.where(dark, 0.85 + 0.15 * u[:, 2], 0.10 + 0.75 * u[:, 2])
    ink = hsv_to_rgb(u[:, 0], saturation, value)
    light = luminance(paper)
    return np.where(dark[:, None], _lighten(ink, light + MIN_CONTRAST), _darken(ink, light - MIN_CONTRAST))


def contrast_paper(dark: NDArray[np.bool_], paper: Floats, ink: Floats) -> Floats:
    """Move paper colours (B, 3) away from given inks until MIN_CONTRAST holds."""
    light = luminance(ink)
    return np.where(dark[:, None], _darken(paper, light - MIN_CONTRAST), _lighten(paper, light + MIN_CONTRAST))


def _extents(scans: NDArray[np.int64], slant: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Left, right, top and bottom of the slanted ink (B, D), in cells from the scan's centre."""
    fields = scan_fields()
    rows = (np.arange(FIELD_SIDE) + 0.5) / SAMPLES_PER_CELL - PADDING - CELLS / 2
    shear = slant[:, None, None] * -rows
    left = (fields.left[scans] + shear).min(axis=2) - CELLS / 2
    right = (fields.right[scans] + shear).max(axis=2) - CELLS / 2
    return left, right, fields.top[scans] - CELLS / 2, fields.bottom[scans] - CELLS / 2


def place_word(
    scans: NDArray[np.int64], slant: Floats, size: tuple[int, int], u: Floats, smallest: float = 0.78
) -> Placement:
    """Lay out words so that no digit touches another or the border.

    scans: (B, D) indices; slant: (B,) shear (positive leans right); size: (H, W) pixels;
    u: (B, 3 D + 3) uniform draws; smallest: least size as a fraction of the largest that fits.
    """
    height, width = size
    digits = scans.shape[1]
    left, right, top, bottom = _extents(scans, slant)

    relative = 0.9 + 0.1 * u[:, :digits]  # sizes within a word differ slightly
    free = width - 2 * MARGIN - GAP * (digits - 1)
    fits = np.minimum(free / ((right - left) * relative).sum(axis=1), MAX_HEIGHT * height / CELLS)
    chosen = fits * (smallest + (1 - smallest) * u[:, -1])
    chosen = np.minimum(fits, np.maximum(chosen, 1.2 * READABLE))  # small only where there is room to stay legible
    scale = chosen[:, None] * relative

    widths = (right - left) * scale
    slack = free - widths.sum(axis=1)
    extra = u[:, digits : 2 * digits] * np.minimum(slack[:, None] / digits, 1.2 * scale)
    extra[:, 0] = u[:, -2] * (slack - extra[:, 1:].sum(axis=1))
    x = MARGIN + np.cumsum(widths + extra, axis=1) - widths + GAP * np.arange(digits) - left * scale

    lowest = MARGIN - (top * scale).min(axis=1)
    highest = height - MARGIN - (bottom * scale).max(axis=1)
    baseline = lowest + u[:, -3] * (highest - lowest)
    wobble = (u[:, 2 * digits : 3 * digits] - 0.5) * 0.8 * scale
    y = np.clip(baseline[:, None] + wobble, lowest[:, None], highest[:, None])
    return Placement(x, y, scale)


def place_digits(scans: NDArray[np.int64], slant: Floats, size: tuple[int, int], place: Placement) -> Placement:
    """Lay out digits at given places, each moved (and made smaller) as little as keeps it MARGIN from the border.

    scans: (B, D) indices; slant: (B,); size: (H, W) pixels; place: (B, D). Digits may touch each other.
    """
    height, width = size
    left, right, top, bottom = _extents(scans, slant)
    fits = np.minimum((width - 2 * MARGIN) / (right - left), (height - 2 * MARGIN) / (bottom - top))
    scale = np.minimum(place.scale, fits)
    x = np.clip(place.x, MARGIN - left * scale, width - MARGIN - right * scale)
    y = np.clip(place.y, MARGIN - top * scale, height - MARGIN - bottom * scale)
    return Placement(x, y, scale)


def draw_strokes(
    scans: NDArray[np.int64], slant: Floats, weight: Floats, place: Placement, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ink coverage (B, H, W) float32 in [0, 1] and boxes (B, D, 4) float32 (x0, y0, x1, y1 in pixels).

    weight: (B,) pen weight in [-1, 1]. A box holds every pixel covered to at least BOX_LEVEL.
    """
    fields = scan_fields()
    height, width = size
    batch, digits = scans.shape
    # A window of whole pixels around each digit's scan; digits of a batch share its extent, not its place.
    reach_y = int(np.ceil(place.scale.max() * (CELLS / 2 + 1)))
    reach_x = int(np.ceil(reach_y * (1 + np.abs(slant).max())))
    x0 = np.floor(place.x).astype(np.int64) - reach_x
    y0 = np.floor(place.y).astype(np.int64) - reach_y
    columns = np.arange(2 * reach_x + 1)
    rows = np.arange(2 * reach_y + 1)
    inverse = 1 / place.scale
    cell_y = (y0[..., None] + rows + 0.5 - place.y[..., None]) * inverse[..., None]  # [B, D, R] from the centre
    cell_x = (x0[..., None] + columns + 0.5 - place.x[..., None]) * inverse[..., None]  # [B, D, C]

    def sample_position(cells: Floats) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        position = (cells + (CELLS / 2 + PADDING)) * SAMPLES_PER_CELL - 0.5
        position = np.minimum(np.maximum(position, 0), FIELD_SIDE - 1.001)
        low = position.astype(np.int64)
        return low, (position - low).astype(np.float32)

    # Bilinear in two passes: whole rows of the field first, then the columns, sheared by the slant.
    low_y, part_y = sample_position(cell_y)
    flat = fields.values.reshape(-1, FIELD_SIDE)
    line = scans[..., None] * FIELD_SIDE + low_y
    upper = flat[line]  # [B, D, R, 48]
    strips = upper + (flat[line + 1] - upper) * part_y[..., None]
    low_x, part_x = sample_position(cell_x[:, :, None, :] + slant[:, None, None, None] * cell_y[..., None])
    start = (np.arange(line.size) * FIELD_SIDE).reshape(*line.shape, 1) + low_x
    strips = strips.reshape(-1)
    before = strips[start]  # [B, D, R, C]
    value = before + (strips[start + 1] - before) * part_x

    # The field's level set is the outline; a ramp of about one pixel in field units is its anti-aliased edge.
    level = (0.46 - 0.06 * weight)[:, None, None, None].astype(np.float32)
    ramp = np.clip(0.62 * inverse, 0.06, 0.46).astype(np.float32)[..., None, None]
    cover = np.minimum(np.maximum((value - level) / ramp + np.float32(0.5), 0), 1)

    ink = cover >= BOX_LEVEL
    across = ink.any(axis=2)
    down = ink.any(axis=3)
    boxes = np.stack(
        [
            x0 + across.argmax(axis=2),
            y0 + down.argmax(axis=2),
            x0 + len(columns) - across[..., ::-1].argmax(axis=2),
            y0 + len(rows) - down[..., ::-1].argmax(axis=2),
        ],
        axis=2,
    ).astype(np.float32)

    # A border as wide as a window takes what windows (not ink) reach beyond the image.
    canvas = np.zeros((batch, height + 2 * len(rows), width + 2 * len(columns)), dtype=np.float32)
    pitch = canvas.shape[2]
    cells = canvas.reshape(-1)
    corner = np.arange(batch) * (canvas.shape[1] * pitch)
    for digit in range(digits):
        origin = corner + (y0[:, digit] + len(rows)) * pitch + x0[:, digit] + len(columns)
        target = origin[:, None, None] + rows[:, None] * pitch + columns
        cells[target] = np.maximum(cells[target], cover[:, digit])
    return canvas[:, len(rows) : len(rows) + height, len(columns) : len(columns) + width], boxes


def compose(
    cover: NDArray[np.float32], ink: Floats, paper: Floats, shading: Floats | None = None
) -> NDArray[np.float32]:
    """Ink over paper: (B, 3, H, W) float32 in [-1, 1].

    cover: (B, H, W); ink, paper: (B, 3) in [0, 1]; shading: (B, 2), change of the paper's brightness over the width
    and over the height.
    """
    _, height, width = cover.shape
    page = paper[:, :, None, None].astype(np.float32)
    if shading is not None:
        slope = shading.astype(np.float32)
        across = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width) - np.float32(0.5)
        down = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height) - np.float32(0.5)
        light = slope[:, 0, None, None] * across[None, None, :] + slope[:, 1, None, None] * down[None, :, None]
        page = np.clip(page + light[:, None], 0, 1)
    image = page + (ink[:, :, None, None].astype(np.float32) - page) * cover[:, None]
    return image * np.float32(2) - np.float32(1)
