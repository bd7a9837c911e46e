"""Scenes of numbers of several lengths."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.handwriting import HandwritingScenes, MixedScenes
from fastvar.handwriting.evaluation import numbers, prompts
from tests.helpers.tiny import tiny_var

SHARES = {1: 0.2, 2: 0.5, 3: 0.3}


def test_shares_are_exact_and_seeded() -> None:
    scenes = MixedScenes(length=50, shares=SHARES, seed=4)
    assert Counter(scenes.regions) == {1: 10, 2: 25, 3: 15} and scenes.text_length == 3 and len(scenes) == 50
    assert scenes.regions == MixedScenes(length=50, shares=SHARES, seed=4).regions
    assert scenes.regions != MixedScenes(length=50, shares=SHARES, seed=5).regions
    assert {"digits", "shares", "seed", "split", "length"} <= {name for name in vars(scenes) if name[0] != "_"}


def test_items_are_those_of_scenes_of_one_length() -> None:
    scenes = MixedScenes(length=20, shares=SHARES, seed=4)
    indices = [7, 3, 19, 0, 11]
    batch = scenes.batch(indices)
    assert set(batch) == {"image", "reference", "reference_position", "text", "regions"}
    for row, index in enumerate(indices):
        one = HandwritingScenes(length=20, digits=scenes.regions[index], seed=4)[index]
        assert batch["text"][row] == one["text"] == scenes[index]["text"] and len(one["text"]) == batch["regions"][row]
        for name in ("image", "reference", "reference_position"):
            assert torch.equal(batch[name][row], one[name])


def test_numbers_to_ask_for() -> None:
    assert numbers(4, {1: 1, 2: 3}) == ["0", "00", "33", "66"]
    var = tiny_var(grids=((1, 1), (2, 2), (16, 16)), num_classes=0, text_length=3)
    assert Counter(map(len, prompts(var, 20, shares=SHARES).texts)) == {1: 4, 2: 10, 3: 6}
    config = SimpleNamespace(text_length=3, subject="bidirectional")
    with_subject: Any = SimpleNamespace(config=config, tokenizer=var.tokenizer)
    found = prompts(with_subject, 20, split="test", shares=SHARES)
    assert Counter(map(len, found.texts)) == {1: 4, 2: 10, 3: 6} and found.references is not None
    with pytest.raises(ValueError, match="HandwritingScenes: digits: expected 1 to 3"):
        MixedScenes(length=4, shares={9: 1.0})
