"""What a handwriting scene consists of, how it is drawn at random, and how it and its references are rendered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastvar.handwriting.draws import Draws
from fastvar.handwriting.rendering import (
    Floats,
    Placement,
    compose,
    contrast_paper,
    draw_ink,
    draw_paper,
    draw_strokes,
    place_digits,
    place_word,
)

DARK_SHARE = 0.3
MAX_SLANT = 0.22
MAX_SHADING = 0.06
REFERENCE_DRAWS = 11
SMALLEST_REFERENCE = 0.6  # of the largest that fits


@dataclass(frozen=True)
class Hand:
    """What a scene shares with its references: dark paper or not (B,), ink (B, 3), slant and pen weight (B,)."""

    dark: NDArray[np.bool_]
    ink: Floats
    slant: Floats
    weight: Floats


@dataclass(frozen=True)
class Scenes:
    """B scenes of D digits before rendering.

    digits, scans: (B, D) int64; paper: (B, 3); shading: (B, 2); place: of the digits; position: (B,) int64, the digit
    that the reference shows; reference_draws: (B, REFERENCE_DRAWS), from which the reference is drawn.
    """

    digits: NDArray[np.int64]
    scans: NDArray[np.int64]
    hand: Hand
    paper: Floats
    shading: Floats
    place: Placement
    position: NDArray[np.int64]
    reference_draws: Floats

    @property
    def subject_scans(self) -> NDArray[np.int64]:
        """(B,) the scans that the references show."""
        return self.scans[np.arange(len(self.scans)), self.position]

    @property
    def subject_place(self) -> Placement:
        """Where the digits that the references show lie in their scenes, (B, 1) each."""
        rows = np.arange(len(self.scans))
        place = self.place
        return Placement(*(values[rows, self.position][:, None] for values in (place.x, place.y, place.scale)))

    @property
    def subject_digits(self) -> NDArray[np.int64]:
        """(B,) the digits 0..9 that the references show."""
        return self.digits[np.arange(len(self.scans)), self.position]


def _shading(u: Floats) -> Floats:
    return (2 * u - 1) * MAX_SHADING


def draw_scenes(
    by_class: tuple[NDArray[np.int64], ...],
    key: tuple[int, ...],
    indices: NDArray[np.int64],
    digits: int,
    size: tuple[int, int],
) -> Scenes:
    """Draw the scenes of `indices` (B,): digits uniform, then a scan of each, then everything else."""
    draws = Draws(key, indices, 5 * digits + 15 + REFERENCE_DRAWS)
    classes = (draws.take(digits) * 10).astype(np.int64)
    counts = np.array([len(scans) for scans in by_class])
    table = np.zeros((10, counts.max()), dtype=np.int64)
    for digit, scans in enumerate(by_class):
        table[digit, : len(scans)] = scans
    scans = table[classes, (draws.take(digits) * counts[classes]).astype(np.int64)]
    dark = draws.take_one() < DARK_SHARE
    paper = draw_paper(dark, draws.take(3))
    hand = Hand(
        dark=dark,
        ink=draw_ink(dark, paper, draws.take(3)),
        slant=(2 * draws.take_one() - 1) * MAX_SLANT,
        weight=2 * draws.take_one() - 1,
    )
    return Scenes(
        digits=classes,
        scans=scans,
        hand=hand,
        paper=paper,
        shading=_shading(draws.take(2)),
        place=place_word(scans, hand.slant, size, draws.take(3 * digits + 3)),
        position=(draws.take_one() * digits).astype(np.int64),
        reference_draws=draws.take(REFERENCE_DRAWS),
    )


def render_scenes(scenes: Scenes, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images (B, 3, H, W) float32 in [-1, 1] and boxes (B, D, 4) float32."""
    hand = scenes.hand
    cover, boxes = draw_strokes(scenes.scans, hand.slant, hand.weight, scenes.place, size)
    return compose(cover, hand.ink, scenes.paper, scenes.shading), boxes


def render_references(
    scans: NDArray[np.int64], hand: Hand, u: Floats, size: tuple[int, int], place: Placement | None = None
) -> NDArray[np.float32]:
    """One digit each on a paper of its own: (B, 3, H, W) float32 in [-1, 1].

    scans: (B,); u: (B, REFERENCE_DRAWS) uniform draws; place: (B, 1) where the digits lie, or as near as they fit;
    None draws a place and a size.
    """
    paper = contrast_paper(hand.dark, draw_paper(hand.dark, u[:, :3]), hand.ink)
    if place is None:
        place = place_word(scans[:, None], hand.slant, size, u[:, 3:9], smallest=SMALLEST_REFERENCE)
    else:
        place = place_digits(scans[:, None], hand.slant, size, place)
    cover, _ = draw_strokes(scans[:, None], hand.slant, hand.weight, place, size)
    return compose(cover, hand.ink, paper, _shading(u[:, 9:11]))


def render_candidates(
    scenes: Scenes,
    by_class: tuple[NDArray[np.int64], ...],
    key: tuple[int, ...],
    indices: NDArray[np.int64],
    count: int,
    size: tuple[int, int],
    place: Placement | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Each scene's reference among count - 1 others of the same digit: (B, count, 3, H, W), and where it stands (B,).

    The others show different scans in different inks, written with the same slant and pen, at `place` (B, 1) like the
    true one, or each at a place of its own. Inks are drawn as the true
    one was: an image that ignores its reference is matched to it with probability 1 / count, no more.
    """
    fewest = min(len(scans) for scans in by_class)
    draws = Draws(key, indices, fewest + 1 + count * (3 + REFERENCE_DRAWS))
    everyone = np.arange(len(indices))
    # Sorting by random keys shuffles a class; a scene's own scan gets the largest key, hence the last place.
    members = np.stack([by_class[digit][:fewest] for digit in scenes.subject_digits])
    keys = np.where(members == scenes.subject_scans[:, None], 2.0, draws.take(fewest))
    shuffled = np.take_along_axis(members, np.argsort(keys, axis=1, kind="stable"), axis=1)
    answers = (draws.take_one() * count).astype(np.int64)
    images = np.empty((len(indices), count, 3, *size), dtype=np.float32)
    hand = scenes.hand
    for n in range(count):
        other = replace(hand, ink=draw_ink(hand.dark, scenes.paper, draws.take(3)))
        images[:, n] = render_references(shuffled[:, n], other, draws.take(REFERENCE_DRAWS), size, place)
    images[everyone, answers] = render_references(scenes.subject_scans, hand, scenes.reference_draws, size, place)
    return images, answers
