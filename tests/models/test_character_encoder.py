"""Characters as a text encoder."""

from __future__ import annotations

import pytest
import torch

from fastvar.models import CharacterTextEncoder, EncodedTexts, T5TextEncoder, load_text_encoder
from fastvar.models.encoded_texts import encode_texts
from tests.helpers.t5 import write_t5


def test_a_row_is_a_character_and_its_place() -> None:
    """By definition: the same character differs only by its place, the same place only by its character."""
    encoder = CharacterTextEncoder(16)
    found = encoder(["abba", "", "b"])
    assert found.lengths == (5, 1, 2) and found.packed.shape == (8, 16) and found.packed.dtype == torch.float32
    a, b, c, d, end = found.packed[:5]
    assert torch.equal(a[:8], d[:8]) and torch.equal(b[:8], c[:8]) and not torch.equal(a[:8], b[:8])
    assert set(found.packed[:, :8].flatten().tolist()) == {-1.0, 1.0}
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    for place, row in enumerate((a, b, c, d, end)):
        torch.testing.assert_close(row[8:], torch.cat([(place * frequencies).sin(), (place * frequencies).cos()]))
    empty, b_alone, end_of_b = found.packed[5:]
    assert torch.equal(empty[:8], end[:8]) and torch.equal(end_of_b[:8], end[:8])
    assert torch.equal(b_alone[:8], b[:8]) and torch.equal(b_alone[8:], a[8:])
    assert encoder([]).packed.shape == (0, 16) and encoder([]).lengths == ()


def test_features_stay_what_they_are() -> None:
    """Models have learned them: a change would make what is saved useless."""
    digits = CharacterTextEncoder(16)([*"0123456789"]).packed[::2, :8]
    assert len({tuple(row.tolist()) for row in digits}) == 10
    assert digits[0].tolist() == [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0]


def test_any_text(caplog: pytest.LogCaptureFixture) -> None:
    encoder = CharacterTextEncoder(8, max_length=4)
    long, cut = encoder(["日本語だ"]), encoder(["日本語"])
    assert torch.equal(long.packed, cut.packed) and "a text of 4 characters is cut to 3: '日本語だ'" in caplog.text
    for text in ("👩‍🚀", "é", "\0", "\n", "\u202e", " "):
        assert encoder([text]).lengths == (min(len(text), 3) + 1,)
    assert torch.equal(encoder(["\ud800"]).packed, encoder(["?"]).packed)
    for wrong in ("a text", [3], [b"a"]):
        with pytest.raises(ValueError, match="CharacterTextEncoder: texts: expected a list of texts, got "):
            encoder(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CharacterTextEncoder: channels: expected a multiple of 4, got 6"):
        CharacterTextEncoder(6)
    with pytest.raises(ValueError, match="CharacterTextEncoder: max_length: expected at least 1, got 0"):
        CharacterTextEncoder(max_length=0)


def test_encoders_by_name(tmp_path: pytest.TempPathFactory) -> None:
    for name, channels in (("characters", 64), ("characters-20", 20)):
        encoder = load_text_encoder(name, max_length=7)
        assert isinstance(encoder, CharacterTextEncoder)
        assert (encoder.channels, encoder.max_length, encoder.name) == (channels, 7, f"characters-{channels}")
    encode_texts(encoder, ["a"], tmp_path / "texts")
    kept = load_text_encoder(str(tmp_path / "texts"))
    assert isinstance(kept, EncodedTexts) and kept.name == "characters-20" and kept.max_length == 7
    folder = write_t5(tmp_path / "t5")
    t5 = load_text_encoder(str(folder), dtype=torch.bfloat16)
    assert isinstance(t5, T5TextEncoder) and t5.dtype == torch.bfloat16 and t5.name == str(folder)
