"""Text features kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastvar.models import CharacterTextEncoder, EncodedTexts, T5TextEncoder, TextFeatures, encode_texts
from tests.helpers.t5 import write_t5
from tests.helpers.tiny import tiny_infinity

TEXTS = ["a cat", "", "日本", "a", "two cats", "b"]


class Counted(CharacterTextEncoder):
    """Says what it was asked for, and stops after some calls."""

    def __init__(self, calls: int = 99) -> None:
        super().__init__(12, max_length=9)
        self.calls, self.asked = calls, list[str]()

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += texts
        return super().__call__(texts)


def test_texts_are_found_again(tmp_path: Path) -> None:
    """In any order and often; each was computed once, in shards."""
    encoder = Counted()
    assert encode_texts(encoder, [*TEXTS, "a"], tmp_path, batch_size=2, shard_size=4) == 6
    assert sorted(encoder.asked) == sorted(TEXTS) and len(list(tmp_path.glob("*.safetensors"))) == 2
    kept = EncodedTexts(tmp_path)
    assert (len(kept), kept.channels, kept.max_length, kept.name) == (6, 12, 9, "characters-12")
    asked = ["b", "日本", "a cat", "b", "", "two cats"]
    found, expected = kept(asked), CharacterTextEncoder(12, max_length=9)(asked)
    assert found.lengths == expected.lengths and torch.equal(found.packed, expected.packed)
    assert kept([]).packed.shape == (0, 12) and kept([]).lengths == ()
    net = tiny_infinity(text_length=9)
    net.text_encoder = kept
    drawn = net.generate(["b", ""], decode=False).tokens
    net.text_encoder = encoder
    assert torch.equal(drawn, net.generate(["b", ""], decode=False).tokens)


def test_an_unknown_text_is_named(tmp_path: Path) -> None:
    encode_texts(CharacterTextEncoder(12), TEXTS, tmp_path)
    kept = EncodedTexts(tmp_path)
    with pytest.raises(ValueError, match=r"EncodedTexts: texts: expected .* encoded into .*, got 'a dog'; fastvar enc"):
        kept(["a", "a dog", "a dog"])
    with pytest.raises(ValueError, match=r"got 'c', 'd', 'e' and 2 more"):
        kept.check(["c", "d", "a", "e", "f", "g"])
    with pytest.raises(ValueError, match="EncodedTexts: texts: expected a list of texts, got 'a'"):
        kept("a")
    assert kept.missing(["x", "a", "x"]) == ["x"]


def test_going_on_after_an_interruption(tmp_path: Path) -> None:
    """Shards that were written stay; what is left is computed, and more can be added."""
    with pytest.raises(KeyboardInterrupt):
        encode_texts(Counted(calls=2), TEXTS, tmp_path, batch_size=2, shard_size=2)
    assert len(EncodedTexts(tmp_path)) == 4 and len(list(tmp_path.iterdir())) == 3
    encoder = Counted()
    assert encode_texts(encoder, TEXTS, tmp_path, batch_size=2, shard_size=2) == 2
    assert sorted(encoder.asked) == ["b", "two cats"]
    assert encode_texts(encoder, [*TEXTS, "more"], tmp_path) == 1
    assert EncodedTexts(tmp_path)(["more", "a"]).lengths == (5, 2)


def test_t5_in_its_own_dtype(tmp_path: Path) -> None:
    """Nothing is lost, and texts that were cut are found by the whole of them."""
    texts = ["ab", "", "abcdefgh", "日", "\ud800"]
    for dtype in (torch.float32, torch.bfloat16):
        encoder = T5TextEncoder(write_t5(tmp_path / "t5"), max_length=6, dtype=dtype)
        encode_texts(encoder, texts, tmp_path / str(dtype), batch_size=1)
        kept = EncodedTexts(tmp_path / str(dtype))
        assert kept.dtype == dtype and kept.channels == 12
        found = kept(texts)
        expected = TextFeatures.joined([encoder([text]) for text in texts])
        assert found.lengths == expected.lengths and found.lengths[2] == 6
        assert found.packed.dtype == torch.float32 and torch.equal(found.packed, expected.packed)


def test_another_encoder_or_a_damaged_folder(tmp_path: Path) -> None:
    encode_texts(CharacterTextEncoder(12), TEXTS, tmp_path)
    with pytest.raises(ValueError, match=r"encode_texts: folder: expected .*'characters-12'.*, got .*'characters-16'"):
        encode_texts(CharacterTextEncoder(16), TEXTS, tmp_path)
    shard = tmp_path / "texts-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"EncodedTexts: folder: .*texts-00000.safetensors: damaged file"):
        EncodedTexts(tmp_path)
    shard.write_bytes(whole)
    about = json.loads((tmp_path / "texts.json").read_text())
    (tmp_path / "texts.json").write_text(json.dumps(about | {"channels": 8}))
    with pytest.raises(ValueError, match=r"texts-00000.safetensors: damaged file"):
        EncodedTexts(tmp_path)
    (tmp_path / "texts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"EncodedTexts: folder: .*texts.json: damaged file"):
        EncodedTexts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"EncodedTexts: folder: expected a folder with texts.json, got"):
        EncodedTexts(tmp_path / "nowhere")
