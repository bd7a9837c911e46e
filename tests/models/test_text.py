"""Texts: packed features, and T5 as what makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastvar.models import T5TextEncoder, TextFeatures
from fastvar.models.text import PaddedTexts, TextAttention, padded, places, row_indices
from tests.helpers.t5 import write_t5
from tests.helpers.tape import recorded
from tests.helpers.tiny import some_texts, tiny_infinity


def test_parts_and_wholes() -> None:
    texts = some_texts((3, 1, 6))
    assert texts.starts == (0, 3, 4)
    parts = [texts.some(slice(i, i + 1)) for i in range(3)]
    assert [part.lengths for part in parts] == [(3,), (1,), (6,)]
    joined = TextFeatures.joined(parts)
    assert joined.lengths == texts.lengths and torch.equal(joined.packed, texts.packed)
    assert texts.some(slice(0, 0)).packed.shape == (0, 12)
    checked = TextFeatures(texts.packed, torch.tensor([3, 1, 6])).check("f: texts", 12, 6)  # type: ignore[arg-type]
    assert checked.lengths == (3, 1, 6) and all(type(length) is int for length in checked.lengths)
    with pytest.raises(ValueError, match=r"f: texts: expected packed features .*, got list"):
        TextFeatures([1.0], (1,)).check("f: texts", 12, 6)  # type: ignore[arg-type]


def test_places_of_rows() -> None:
    """By definition; a graph makes them in memory of its own and reads none that was there before."""
    lengths, cpu = (3, 1, 2), torch.device("cpu")
    for _ in range(2):
        (found, of_rows), tape = recorded(lambda: (places(lengths, cpu), row_indices(lengths, cpu)))
        made = [found.rows, found.valid, *of_rows]
        assert not tape.given and all(tensor.untyped_storage().data_ptr() in tape.made for tensor in made)
    assert found.rows.tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert found.valid.squeeze().tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert [rows.tolist() for rows in of_rows] == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 0, 0, 1]]
    assert places((2, 2), cpu) == (None, None, 2)
    assert [rows.tolist() for rows in row_indices((), cpu)] == [[], []]


@pytest.mark.parametrize(
    ("lengths", "longest", "rows"), [((3, 1), 8, 8), ((3, 1), 512, 16), ((17, 32), 512, 32), ((2, 33), 48, 48)]
)
def test_padded_texts(lengths: tuple[int, ...], longest: int, rows: int) -> None:
    """To a power of two of rows, at least 16, at most those of the longest text; each text's own rows come first."""
    texts = TextFeatures(torch.randn(sum(lengths), 3), lengths)
    found = padded(texts, longest)
    assert found.features.shape == (2, rows, 3) and found.counts.tolist() == list(lengths)
    for row, valid, own in zip(found.features, found.where.valid[:, 0, 0], texts.packed.split(lengths), strict=True):
        assert torch.equal(row[valid], own)
    other = padded(TextFeatures(torch.randn(5, 3), (5,)), 5)
    joined = PaddedTexts.joined([found, other])
    assert joined.features.shape == (3, rows, 3) and torch.equal(joined.features[2, :5], other.features[0])
    assert padded(TextFeatures(torch.randn(0, 3), ()), 8).features.shape[0] == 0


def test_attention_reads_each_text_alone() -> None:
    """Against softmax by definition, in float64; values have a bias and keys have none."""
    attention = TextAttention(16, 12, 2).double()
    torch.nn.init.normal_(attention.v_bias)
    texts = some_texts((3, 1, 6))
    packed, h = texts.packed.double(), torch.randn(3, 5, 16, dtype=torch.float64)
    got = attention(h, attention.keys_and_values(packed, places((3, 1, 6), packed.device)))
    key_weight, value_weight = attention.kv.weight.unflatten(0, (2, 2, 8))
    for i, rows in enumerate(packed.split([3, 1, 6])):
        q = attention.query(h[i]).unflatten(1, (2, 8))
        k = torch.einsum("tc,hdc->thd", rows, key_weight)
        v = torch.einsum("tc,hdc->thd", rows, value_weight) + attention.v_bias.unflatten(0, (2, 8))
        weights = (torch.einsum("nhd,thd->hnt", q, k) / 8**0.5).softmax(-1)
        expected = attention.proj(torch.einsum("hnt,thd->nhd", weights, v).flatten(1))
        torch.testing.assert_close(got[i], expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of a few thousand random weights and a tokenizer of bytes."""
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5TextEncoder:
    return T5TextEncoder(folder, max_length=6)


def test_t5(encoder: T5TextEncoder) -> None:
    """Rows of a text are the same alone and beside longer ones; the empty text has its end-of-text token."""
    found = encoder(["ab", "", "abcd"])
    assert encoder.channels == 12 and found.lengths == (3, 1, 5) and found.packed.shape == (9, 12)
    assert found.packed.dtype == torch.float32 and not found.packed.requires_grad
    for i, text in enumerate(["ab", "", "abcd"]):
        alone = encoder([text])
        torch.testing.assert_close(alone.packed, found.some(slice(i, i + 1)).packed, rtol=1e-4, atol=1e-5)
    assert encoder([]).packed.shape == (0, 12) and encoder([]).lengths == ()
    expected = encoder.model(input_ids=torch.tensor([encoder.tokenizer("ab")["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(encoder(["ab"]).packed, expected)


def test_long_texts_are_cut(encoder: T5TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """To the first tokens and the end-of-text token."""
    found = encoder(["abcdefgh", "abcde"])
    assert found.lengths == (6, 6) and torch.equal(found.packed[:6], found.packed[6:])
    assert "a text of 9 tokens is cut to 6: 'abcdefgh'" in caplog.text


def test_any_unicode(encoder: T5TextEncoder) -> None:
    for text in ("日本", "👩‍🚀", "é", "\0", "\n", "\u202e", " "):
        assert torch.isfinite(encoder([text]).packed).all(), text
    assert torch.equal(encoder(["\ud800"]).packed, encoder(["?"]).packed)
    for wrong in ("a text", [3], [b"a"]):
        with pytest.raises(ValueError, match="T5TextEncoder: texts: expected a list of texts, got "):
            encoder(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="T5TextEncoder: max_length: expected at least 1, got 0"):
        T5TextEncoder("nowhere", max_length=0)


def test_images_of_prompts(folder: Path) -> None:
    """From texts to pictures; in bfloat16 T5 computes in it and answers in float32."""
    low = T5TextEncoder(folder, dtype=torch.bfloat16, local_files_only=True)
    assert low(["ab"]).packed.dtype == torch.float32 and low.model.dtype == torch.bfloat16
    net = tiny_infinity()
    net.text_encoder = T5TextEncoder(folder, max_length=6)
    out = net.generate(["ab", "", "日"], negative=["x", "", "x"], guidance=2.0)
    assert out.images.shape == (3, 3, 6, 6)
    assert not torch.equal(out.tokens, net.generate(["ab", "", "日"], guidance=2.0).tokens)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"T5TextEncoder: needs transformers: pip install .*\[text\]"):
        T5TextEncoder("google/flan-t5-xl")
