"""Evaluations draw as they were told and count as they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvar.data import Reading
from fastvar.evaluation import draw, score_reading
from fastvar.models import SamplingOptions
from tests.helpers.tiny import some_subjects, tiny_var

OPTIONS = {"guidance": 1.5, "temperature": 0.7, "top_k": 6, "top_p": 0.8}


@pytest.mark.parametrize("batch_size", [2, 64])
def test_drawing(batch_size: int) -> None:
    """By all of the options, whatever the size of the batches, each row with its own subject."""
    var, labels = tiny_var(subject="block_causal"), torch.tensor([0, 3, 2])
    subject = some_subjects(var, 3)
    options: dict[str, Any] = {"batch_size": batch_size, **OPTIONS}
    expected = var.generate(labels, subject=subject, seed=5, **OPTIONS).images
    found = draw(var, labels, SamplingOptions(**options), seed=5, subject=subject)
    torch.testing.assert_close(found, expected)


def test_drawing_in_tiles() -> None:
    var, labels = tiny_var(), torch.tensor([0, 3])
    whole, tiled = (draw(var, labels, SamplingOptions(decode_tile=tile), seed=5) for tile in (0, 2))
    torch.testing.assert_close(tiled, var.generate(labels, seed=5, decode_tile=2).images)
    assert not torch.equal(tiled, whole)


def test_a_batch_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is drawn."""
    var, labels = tiny_var(), torch.zeros(9, dtype=torch.int64)
    row = 2 * 2 * var.config.depth * var.schedule.num_tokens * var.config.embed_dim * 4
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": row, "SC_PHYS_PAGES": 4}[name])
    monkeypatch.setattr(type(var), "generate", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"^draw: batch_size: expected at most 4, .* got 8$"):
        draw(var, labels, SamplingOptions(guidance=2.0, batch_size=8))


def test_reading() -> None:
    def reader(images: torch.Tensor) -> list[Reading]:
        return [Reading(text, torch.zeros(0, 4), torch.zeros(0), 0.0) for text in ("12", "13", "", "12")]

    found = score_reading(torch.zeros(4, 3, 2, 2), ["12", "12", "45", "12"], reader)  # type: ignore[arg-type]
    assert found.accuracy == 0.5 and found.similarity == (1 + 0.5 + 0 + 1) / 4
    assert found.accuracy_interval == pytest.approx((0.150039, 0.849961), abs=1e-6)
    half = 1.959963984540054 * torch.tensor([1, 0.5, 0, 1]).std().item() / 2
    assert found.similarity_interval == pytest.approx((0.625 - half, 0.625 + half))
    summary = found.summary()
    assert (summary["word_accuracy"], summary["ned"], summary["images"]) == (0.5, 0.625, 4)
    assert summary["word_accuracy_95"] == found.accuracy_interval and summary["ned_95"] == found.similarity_interval
