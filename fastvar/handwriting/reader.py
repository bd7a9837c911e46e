"""A small optical character reader: images of handwriting in, words with boxes and confidences out.

It learns from scenes of its own scans, degraded as a tokenizer would, and from things that are no digit.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from fastvar.data import Reading
from fastvar.handwriting.characters import BORDER, JUNK, SIDE, CharacterClassifier
from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.handwriting.segmentation import segment
from fastvar.pictures import check_images

_CHUNK = 1024  # images a pass, so that memory stays bounded
# (digits, scenes, degraded) of what is rendered for training, at 32 x 32.
COURSES = ((2, 1000, False), (2, 1500, True), (3, 300, False), (3, 500, True), (1, 300, True))
CENTRES = 1800
JUNK_SHARE = 0.12  # of the digits' number


class Reader:
    """Reads numbers: ink apart from paper, components, a classifier for each (`segmentation`, `characters`).

    The classifier is fitted at the first use in a process (a few seconds) to scans that no scene shows. A component
    that looks like no digit is left out. A word's confidence is the least of its characters', times the share of the
    image's ink that they make up. Deterministic; runs on the CPU.

    Args:
        cache: a safetensors file: loaded if it is there, else written after fitting.

    Raises:
        ValueError: the cache file holds something else.
    """

    def __init__(self, cache: str | Path | None = None) -> None:
        if cache is not None and Path(cache).exists():
            self._classifier = CharacterClassifier.load(cache)
            return
        self._classifier = trained_characters()
        if cache is not None:
            self._classifier.save(cache)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Reading]:
        """Read images (B, 3, H, W), floats in [0, 1] on any device. Odd content gives empty or unsure readings.

        Raises ValueError for another shape, dtype or range, infinities or NaNs.
        """
        check_images(images, "Reader: images")
        return [reading for chunk in images.split(_CHUNK) for reading in self._read(chunk)]

    def _read(self, images: Tensor) -> list[Reading]:
        pages = segment(images)
        probabilities = self._classifier.probabilities(torch.from_numpy(pages.crops(SIDE, BORDER)))
        confidences, digits = probabilities[:, :JUNK].max(dim=1)
        legible = probabilities[:, JUNK] < 0.5
        boxes = torch.from_numpy(pages.image_boxes())
        areas = torch.from_numpy(pages.areas)
        readings = []
        for page in range(len(images)):
            characters = torch.arange(len(digits))[pages.of_page(page)]
            characters = characters[legible[characters]]
            if not len(characters):
                readings.append(Reading("", torch.zeros(0, 4), torch.zeros(0), 0.0))
                continue
            certain = confidences[characters]
            read = areas[characters].sum().item() / int(pages.ink[page])
            text = "".join(map(str, digits[characters].tolist()))
            readings.append(Reading(text, boxes[characters], certain, certain.min().item() * read))
        return readings


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each blurred, coarsened, coded or made noisy to its own degree."""
    count, _, height, width = images.shape

    def amount(of: float) -> Tensor:
        return of * torch.rand(count, 1, 1, 1, generator=generator)

    blurred = avg_pool2d(pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    result = images + (blurred - images) * amount(1.0)
    coarse = torch.rand(count, generator=generator) < 0.25
    if coarse.any():
        small = interpolate(images[coarse], scale_factor=0.6, mode="area")
        result[coarse] = interpolate(small, size=(height, width), mode="bicubic")
    if height % 8 == 0 and width % 8 == 0:
        coded = torch.rand(count, generator=generator) < 0.3
        result[coded] = _quantize_blocks(result[coded], 0.05 + amount(0.3)[coded])
    noise = torch.randn(images.shape, generator=generator)
    return (result + noise * amount(0.06)).clamp(0, 1)


def _quantize_blocks(images: Tensor, step: Tensor) -> Tensor:
    """Round the 8 x 8 cosine coefficients of images (B, 3, H, W) to multiples of step (B, 1, 1, 1), as JPEG does."""
    count, channels, height, width = images.shape
    k, n = torch.arange(8)[:, None], torch.arange(8)[None, :]
    basis = torch.cos(torch.pi / 8 * (n + 0.5) * k) * 0.5
    basis[0] *= 0.5**0.5
    blocks = images.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    step = step[..., None, None]
    coefficients = torch.round(basis @ blocks @ basis.T / step) * step
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(images.shape)


def character_crops(scenes: HandwritingScenes, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Crops (M, 16, 16) of all scenes, cut as the reader cuts them, and their digits (M,).

    With a generator the images are degraded first.
    """
    batch = scenes.batch(range(len(scenes)))
    images = (batch["image"] + 1) / 2
    if generator is not None:
        images = degrade(images, generator)
    pages = segment(images)
    boxes = pages.image_boxes()
    truth = batch["boxes"].numpy()[pages.page]  # [M, D, 4]
    # A component is a digit if their boxes nearly agree: digits that ran together teach nothing.
    difference = np.abs(truth - boxes[:, None]).max(axis=2)
    nearest = difference.argmin(axis=1)
    rows = np.arange(len(boxes))
    agree = difference[rows, nearest] <= 2.5
    digits = np.array([[int(character) for character in text] for text in batch["text"]])
    classes = digits[pages.page, nearest]
    return torch.from_numpy(pages.crops(SIDE, BORDER)[agree]), torch.from_numpy(classes[agree])


def junk_crops(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, 16, 16): halves of digits joined, digits run together, cut digits and blots. digits: (M, 16, 16)."""
    first, second = (digits[torch.randint(len(digits), (count,), generator=generator)] for _ in range(2))
    half = SIDE // 2
    joined = torch.cat([first[:, :half], second[:, half:].flip(2)], dim=1)
    together = interpolate(torch.cat([first, second], dim=2)[:, None], size=(SIDE, SIDE), mode="area")[:, 0]
    cut = interpolate(first[:, None, :, : half + 1], size=(SIDE, SIDE), mode="bilinear")[:, 0]
    cloud = torch.rand(count, 1, 6, 6, generator=generator)
    blots = ((interpolate(cloud, size=(SIDE, SIDE), mode="bicubic")[:, 0] - 0.5) * 4).clamp(0, 1)
    kind = torch.randint(4, (count,), generator=generator)
    return torch.stack([joined, together, cut, blots], dim=1)[torch.arange(count), kind]


@lru_cache(maxsize=1)
def trained_characters() -> CharacterClassifier:
    """The classifier, fitted to the reader's scans at the first call in a process (a few seconds); deterministic."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for seed, (digits, length, degraded) in enumerate(COURSES):
        scenes = HandwritingScenes(length=length, digits=digits, split="reader", seed=seed)
        parts.append(character_crops(scenes, generator if degraded else None))
    crops, classes = (torch.cat(column) for column in zip(*parts, strict=True))
    junk = junk_crops(crops, int(JUNK_SHARE * len(crops)), generator)
    crops = torch.cat([crops, junk])
    classes = torch.cat([classes, torch.full((len(junk),), JUNK)])
    order = torch.randperm(len(crops), generator=generator)
    return CharacterClassifier.fit(crops[order], classes[order], CENTRES)
