"""Prompts and rewards of handwriting."""

from __future__ import annotations

import pytest
import torch

from fastvar.handwriting import HandwritingScenes, Reader
from fastvar.handwriting.evaluation import every_number
from fastvar.rl.rewards import OCRReward, create


def test_numbers_are_spread_over_all() -> None:
    assert every_number(2, 4) == ["00", "25", "50", "75"]
    assert every_number(1, 12) == [*map(str, range(10)), "0", "1"]


def test_ocr_on_real_scenes() -> None:
    """Scenes score near 2 under their own number, far less under another; the mask lies on the ink."""
    items = HandwritingScenes(length=64, split="test").batch(list(range(64)))
    images, texts = items["image"] * 0.5 + 0.5, items["text"]
    reward = OCRReward(Reader())
    right, mask = reward(images, texts)
    wrong, _ = reward(images, [f"{99 - int(text):02d}" for text in texts])
    assert right.median() > 1.8 and wrong.mean() < right.mean() - 1
    assert mask is not None
    centres = ((items["boxes"][..., :2] + items["boxes"][..., 2:]) / 2).long()
    read = right > 1.5
    on_ink = torch.stack([mask[b, y, x] for b in read.nonzero()[:, 0] for x, y in centres[b]])
    assert on_ink.float().mean() > 0.98


def test_subject() -> None:
    """The true reference is nearer than one of another item; without a character there is nothing nearer."""
    items = HandwritingScenes(length=24, size=(24, 32), split="test").batch(list(range(24)))
    images, references = items["image"] * 0.5 + 0.5, items["reference"] * 0.5 + 0.5
    reward = create("subject")
    own, other = reward(images, items["text"], references).scores, reward(images, [], references.roll(1, 0)).scores
    assert (own > other).float().mean() > 0.9 and own.median() > -1 and other.median() < -1.2
    copied = reward(references, [], references).scores
    assert (copied == 0).all()
    assert reward(torch.full_like(images, 0.5), [], references).scores.tolist() == [-4.0] * 24
    with pytest.raises(ValueError, match="SubjectReward: references: expected"):
        reward(images, [])
