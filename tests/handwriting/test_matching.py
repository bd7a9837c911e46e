"""Matching references: real scenes find their own far above chance, unrelated images do not."""

import pytest
import torch

from fastvar.data import wilson_interval
from fastvar.handwriting import HandwritingScenes, match_reference
from fastvar.handwriting.reader import degrade


@pytest.fixture(scope="module", params=["own", "scene"])
def material(request):
    scenes = HandwritingScenes(length=600, split="test", seed=5, reference_place=request.param)
    batch, candidates = scenes.batch(range(600)), scenes.candidates(range(600), 8)
    return (batch["image"] + 1) / 2, (candidates["images"] + 1) / 2, candidates["positions"], candidates["answers"]


def test_scenes_match_their_reference(material):
    images, candidates, positions, answers = material
    match = match_reference(images, candidates, positions)
    assert match.found.all()
    rates = match.rates(answers)
    assert rates["chance"] == 1 / 8
    # Measured: shape 0.97, ink 0.99, joint 1.00.
    assert rates["shape"] > 0.93 and rates["ink"] > 0.95 and rates["joint"] > 0.97


def test_degraded_scenes_still_match(material):
    images, candidates, positions, answers = material
    degraded = degrade(images, torch.Generator().manual_seed(0))
    rates = match_reference(degraded, candidates, positions).rates(answers)
    assert rates["shape"] > 0.8 and rates["ink"] > 0.7 and rates["joint"] > 0.85


def test_images_that_ignore_the_reference_match_by_chance(material):
    images, candidates, positions, answers = material
    rates = match_reference(images.roll(1, 0), candidates, positions).rates(answers)
    low, high = wilson_interval(75, 600)
    for name in ("shape", "ink", "joint"):
        assert low - 0.02 < rates[name] < high + 0.02, name


def test_missing_digits_are_misses(material):
    images, candidates, positions, answers = (part[:6] for part in material)
    images = images.clone()
    images[:2] = 0.5
    positions = positions.clone()
    positions[2], positions[3] = 2, -1
    match = match_reference(images, candidates, positions)
    assert match.found.tolist() == [False] * 4 + [True] * 2
    assert match.shape[:4].tolist() == match.ink[:4].tolist() == [-1] * 4
    assert match.rates(answers)["joint"] <= 2 / 6
    assert torch.isinf(match.shape_distances[:4]).all()


def test_a_blank_candidate_is_never_chosen(material):
    images, candidates, positions, answers = (part[:40] for part in material)
    candidates = candidates.clone()
    blank = (answers + 1) % 8
    candidates[torch.arange(40), blank] = 0.7
    match = match_reference(images, candidates, positions)
    assert not (match.joint == blank).any() and not (match.shape == blank).any()


def test_errors_name_the_argument(material):
    images, candidates, positions, answers = (part[:4] for part in material)
    with pytest.raises(ValueError, match=r"match_reference: candidates: expected values in \[0, 1\], got \[-1"):
        match_reference(images, candidates * 2 - 1, positions)
    with pytest.raises(ValueError, match=r"match_reference: candidates: expected \(4, N >= 2"):
        match_reference(images, candidates[:, :1], positions)
    with pytest.raises(ValueError, match=r"match_reference: positions: expected \(4,\) integers"):
        match_reference(images, candidates, positions.float())
    with pytest.raises(ValueError, match=r"ReferenceMatch.rates: answers: expected \(4,\)"):
        match_reference(images, candidates, positions).rates(answers[:3])
