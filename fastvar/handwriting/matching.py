"""Does an image show its reference subject? Telling the true reference among others of the same digit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvar.handwriting.characters import BORDER, SIDE, gradient_features
from fastvar.handwriting.segmentation import Pages, segment
from fastvar.pictures import check_images

# Median distances of candidates that show another scan in another ink: they make shape and ink commensurable.
SHAPE_SCALE = 0.40
INK_SCALE = 0.55


@dataclass(frozen=True)
class ReferenceMatch:
    """The nearest of N candidates to the digit in each image, (B,) int64 each, -1 where no such digit was found.

    shape: by gradient histograms of the cropped, size-normalised digit; ink: by its colour; joint: by the sum of both
    distances in units of SHAPE_SCALE and INK_SCALE. shape_distances, ink_distances: (B, N) float32, infinite where the
    digit or the candidate's was not found.
    """

    shape: Tensor
    ink: Tensor
    joint: Tensor
    shape_distances: Tensor
    ink_distances: Tensor

    @property
    def found(self) -> Tensor:
        """(B,) bool: whether the image has a character at the position."""
        return self.joint >= 0

    def rates(self, answers: Tensor) -> dict[str, float]:
        """Share of images matched to the true candidate, "shape", "ink" and "joint"; and "chance", 1 / N.

        answers: (B,) where the true candidate stands. Images without the digit count as misses.
        Raises ValueError for another shape or an empty batch.
        """
        if answers.shape != self.joint.shape or not len(answers):
            expected = f"({max(len(self.joint), 1)},)"
            raise ValueError(f"ReferenceMatch.rates: answers: expected {expected}, got {tuple(answers.shape)}")
        truth = answers.to(self.joint.device)
        rates = {name: (getattr(self, name) == truth).double().mean().item() for name in ("shape", "ink", "joint")}
        return rates | {"chance": 1 / self.shape_distances.shape[1]}


@torch.no_grad()
def match_reference(images: Tensor, candidates: Tensor, positions: Tensor) -> ReferenceMatch:
    """Which candidate reference is nearest to the digit at `positions` in each image, by shape, by ink and by both.

    `HandwritingScenes.candidates` makes the candidates and the positions (its images are in [-1, 1]: map them first).

    Args:
        images: (B, 3, H, W) float in [0, 1], e.g. generated.
        candidates: (B, N, 3, h, w) float in [0, 1], one digit each; N >= 2.
        positions: (B,) integers, which character of the image, from the left.

    Raises:
        ValueError: another shape, dtype or range (a minimum below zero tells of values in [-1, 1]).
    """
    check_images(images, "match_reference: images")
    check_images(candidates, "match_reference: candidates", dimensions=5)
    batch, count = candidates.shape[:2]
    if len(images) != batch or count < 2:
        raise ValueError(
            f"match_reference: candidates: expected ({len(images)}, N >= 2, 3, h, w), got {tuple(candidates.shape)}"
        )
    if positions.shape != (batch,) or positions.is_floating_point():
        raise ValueError(
            f"match_reference: positions: expected ({batch},) integers, got {tuple(positions.shape)} {positions.dtype}"
        )
    pages, references = segment(images), segment(candidates.flatten(0, 1))
    wanted = positions.cpu().numpy()
    starts, stops = (np.searchsorted(pages.page, np.arange(batch), side=side) for side in ("left", "right"))
    subjects = np.where((wanted >= 0) & (starts + wanted < stops), starts + wanted, -1)
    models = _largest(references, batch * count)

    shapes, inks = _describe(pages)
    model_shapes, model_inks = _describe(references)
    missing = torch.from_numpy((subjects[:, None] < 0) | (models.reshape(batch, count) < 0))

    def distances(ours: Tensor, theirs: Tensor) -> Tensor:
        difference = ours[subjects][:, None] - theirs[models].view(batch, count, -1)
        return difference.norm(dim=2).masked_fill(missing, torch.inf)

    shape, ink = distances(shapes, model_shapes), distances(inks, model_inks)
    joint = shape / SHAPE_SCALE + ink / INK_SCALE

    def nearest(values: Tensor) -> Tensor:
        return values.argmin(dim=1).masked_fill(missing.all(dim=1), -1)

    return ReferenceMatch(nearest(shape), nearest(ink), nearest(joint), shape, ink)


@torch.no_grad()
def subject_distances(images: Tensor, references: Tensor) -> Tensor:
    """How far the most similar character of each image is from the reference's, by shape and ink together.

    In the units of `ReferenceMatch.joint`: about 2 between characters of the same class in another scan and ink, near 0
    for the same one. A model that may write the subject anywhere in its text is not asked where.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        references: (B, 3, h, w) float in [0, 1], one character each.

    Returns:
        (B,) float32, infinite where an image or its reference has no character.

    Raises:
        ValueError: another shape, dtype or range.
    """
    check_images(images, "subject_distances: images")
    check_images(references, "subject_distances: references")
    if len(references) != len(images):
        raise ValueError(f"subject_distances: references: expected {len(images)}, got {len(references)}")
    pages, models = segment(images), segment(references)
    shapes, inks = _describe(pages)
    model_shapes, model_inks = _describe(models)
    owners = _largest(models, len(references))[pages.page]
    joint = (shapes[:-1] - model_shapes[owners]).norm(dim=1) / SHAPE_SCALE
    joint = joint + (inks[:-1] - model_inks[owners]).norm(dim=1) / INK_SCALE
    joint = joint.masked_fill(torch.from_numpy(owners < 0), torch.inf)
    nearest = torch.full((len(images),), torch.inf)
    return nearest.scatter_reduce(0, torch.from_numpy(pages.page).long(), joint.float(), "amin")


def _largest(pages: Pages, count: int) -> np.ndarray:
    """(count,) the character with most ink on each page, -1 on a page without any."""
    largest = np.full(count, -1, dtype=np.int64)
    order = np.argsort(pages.areas, kind="stable")
    largest[pages.page[order]] = order  # the last write is the largest
    return largest


def _describe(pages: Pages) -> tuple[Tensor, Tensor]:
    """Shapes (M + 1, 264) and inks (M + 1, 3); the last row, index -1, stands for "none"."""
    # Slant is left in: it belongs to the subject's hand.
    shapes = gradient_features(torch.from_numpy(pages.crops(SIDE, BORDER, deslant=False)))
    inks = torch.from_numpy(pages.ink_colours())
    return tuple(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]) for rows in (shapes, inks))  # type: ignore[return-value]
