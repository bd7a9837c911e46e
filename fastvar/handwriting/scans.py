"""The 1,797 scanned digits that come with scikit-learn, their partition, and smooth fields to draw them from.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the test part, as shipped with scikit-learn): 8 x 8 counts in 0..16 of ink pixels in 4 x 4 blocks of a scanned bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastvar.handwriting.draws import hash_integers
from fastvar.installation import install_command

CELLS = 8  # a scan is CELLS x CELLS
PADDING = 2  # empty cells around a scan in its field, so that reading outside finds paper
SAMPLES_PER_CELL = 4
FIELD_SIDE = (CELLS + 2 * PADDING) * SAMPLES_PER_CELL
NEIGHBOURS = 7  # a scan is legible if most of so many nearest scans show its digit
# Shares of every class. The scenes of a split and the reader never see one another's scans.
SHARES = {"reader": 0.55, "train": 0.30, "test": 0.15}
SHARPENING = 1.5
# Field value from which ink may show with the heaviest pen; what lies below is empty for the layout.
INK_LEVEL = 0.22


@dataclass(frozen=True)
class ScanFields:
    """Every scan as a smooth field, with its outline in cells.

    values: (1797, 48, 48) float32 in [0, 1]; sample i lies at (i + 0.5) / 4 - 2 cells from the scan's corner.
    left, right: (1797, 48) float64, outermost ink of each row in cells (+inf and -inf where the row is empty).
    top, bottom: (1797,) float64, in cells.
    """

    values: NDArray[np.float32]
    left: NDArray[np.float64]
    right: NDArray[np.float64]
    top: NDArray[np.float64]
    bottom: NDArray[np.float64]


@lru_cache(maxsize=1)
def load_scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scans (1797, 8, 8) float32 in [0, 1] and their classes (1797,) int64, both read-only.

    Raises ImportError, with the remedy, if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"handwriting scenes need scikit-learn: {install_command('train')}") from error
    digits = load_digits()
    scans = (np.asarray(digits.images) / 16).astype(np.float32)
    classes = np.asarray(digits.target, dtype=np.int64)
    scans.flags.writeable = False
    classes.flags.writeable = False
    return scans, classes


@lru_cache(maxsize=1)
def legible_scans() -> NDArray[np.bool_]:
    """(1797,) whether most of a scan's seven nearest other scans show the same digit: 1,771 do.

    The other 26 (a nine like a three, an eight without loops) cannot be told at 8 x 8 and are not used.
    """
    scans, classes = load_scans()
    # Integer counts, so that distances are exact and ties go to the lower index everywhere.
    counts = np.round(scans.reshape(len(scans), -1).astype(np.float64) * 16)
    norms = (counts**2).sum(axis=1)
    distances = norms[:, None] + norms[None, :] - 2 * counts @ counts.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
    agreeing = np.count_nonzero(classes[nearest] == classes[:, None], axis=1)
    return np.asarray(agreeing > NEIGHBOURS // 2)


@lru_cache(maxsize=1)
def _partition() -> dict[str, NDArray[np.int64]]:
    _, classes = load_scans()
    legible = legible_scans()
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SHARES}
    for digit in range(10):
        members = np.flatnonzero((classes == digit) & legible)
        # Ordered by a hash, not by a generator whose stream a library may change.
        members = members[np.argsort(hash_integers(members), kind="stable")]
        ends = np.round(np.cumsum(list(SHARES.values())) * len(members)).astype(int)
        for name, part in zip(SHARES, np.split(members, ends[:-1]), strict=True):
            parts[name].append(part)
    joined = {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
    for indices in joined.values():
        indices.flags.writeable = False
    return joined


def scan_partition() -> dict[str, NDArray[np.int64]]:
    """Sorted scan indices (int64) of the disjoint parts "reader", "train" and "test": 55, 30 and 15 % of each digit.

    The 26 scans that `legible_scans` rejects are in none.
    """
    return dict(_partition())


@lru_cache(maxsize=3)
def scans_by_class(part: str) -> tuple[NDArray[np.int64], ...]:
    """For each digit 0..9 the scan indices of one part of `scan_partition`."""
    _, classes = load_scans()
    indices = _partition()[part]
    return tuple(indices[classes[indices] == digit] for digit in range(10))


def _cubic_matrix(b: float, c: float) -> NDArray[np.float64]:
    """(48, 8) weights of the Mitchell-Netravali cubic (b, c) that upsample one axis of a scan."""
    position = (np.arange(FIELD_SIDE) + 0.5) / SAMPLES_PER_CELL - PADDING
    x = np.abs(position[:, None] - (np.arange(CELLS) + 0.5)[None, :])
    near = ((12 - 9 * b - 6 * c) * x**3 + (-18 + 12 * b + 6 * c) * x**2 + (6 - 2 * b)) / 6
    far = ((-b - 6 * c) * x**3 + (6 * b + 30 * c) * x**2 + (-12 * b - 48 * c) * x + (8 * b + 24 * c)) / 6
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@lru_cache(maxsize=1)
def scan_fields() -> ScanFields:
    """The smooth fields of all scans (16 MB, built once a process in some 50 ms)."""
    scans, _ = load_scans()
    # Holes of small loops and thin strokes are half-tones in an 8 x 8 count: sharpened, they survive the outline's cut.
    padded = np.pad(scans.astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    sharp = np.clip(scans + SHARPENING * (scans - blurred), -0.25, 1.25)
    matrix = _cubic_matrix(1 / 3, 1 / 3)
    values = np.clip(matrix @ sharp @ matrix.T, 0, 1).astype(np.float32)
    ink = values > INK_LEVEL
    edges = np.arange(FIELD_SIDE + 1) / SAMPLES_PER_CELL - PADDING
    occupied = np.asarray(ink.any(axis=2))
    left = np.where(occupied, edges[ink.argmax(axis=2)], np.inf)
    right = np.where(occupied, edges[FIELD_SIDE - ink[:, :, ::-1].argmax(axis=2)], -np.inf)
    top = edges[occupied.argmax(axis=1)]
    bottom = edges[FIELD_SIDE - occupied[:, ::-1].argmax(axis=1)]
    return ScanFields(values, left, right, top, bottom)
