"""Decoding in tiles: as the whole where it can be, without seams where not, and with less at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastvar.models import BSQTokenizer, VQTokenizer
from fastvar.models.scale_tokenizer import ScaleTokenizer
from fastvar.models.tiles import in_tiles
from tests.helpers.tiny import some_subjects, some_texts, tiny_bits, tiny_infinity, tiny_tokenizer, tiny_var

GRIDS = ((1, 1), (24, 37))
RADIUS = 9  # cells around a pixel that the tiny decoders see of, generously


def tokenizers() -> list[ScaleTokenizer]:
    return [tiny_tokenizer(GRIDS, chroma_gain=2.0), tiny_bits(GRIDS)]


def features(tokenizer: ScaleTokenizer) -> torch.Tensor:
    shape = tokenizer.empty_feature_map(2).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def local(tokenizer: ScaleTokenizer) -> ScaleTokenizer:
    """The same without statistics over the picture and without attention: a pixel depends on what is near."""
    for module in tokenizer.decoder.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "SpatialAttention":
                setattr(module, name, nn.Identity())
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1], ids=["codebook", "bits"])
def test_a_tile_as_large_as_the_picture_is_exact(kind: int) -> None:
    tokenizer = tokenizers()[kind]
    cells = features(tokenizer)
    expected = tokenizer.decode_features(cells)
    assert torch.equal(tokenizer.decode_features(cells, tile=37), expected)
    assert not torch.equal(tokenizer.decode_features(cells, tile=36), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1], ids=["codebook", "bits"])
def test_with_enough_overlap_tiles_are_as_the_whole(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where group norms and attention allow, which take statistics and keys of the whole."""
    monkeypatch.setattr("fastvar.models.autoencoder.normalised", lambda norm, x, **_: torch.nn.functional.silu(x))
    tokenizer = local(tokenizers()[kind])
    cells = features(tokenizer)
    expected = tokenizer.decode_features(cells)
    near = [tokenizer.decode_features(cells, tile=18, overlap=overlap) for overlap in (2 * RADIUS, 0)]
    torch.testing.assert_close(near[0], expected, rtol=1e-4, atol=1e-5)
    assert (near[1] - expected).abs().max() > 1e-2


@torch.no_grad()
def test_seams_do_not_show() -> None:
    """What tiles get wrong changes no faster across a seam than anywhere else, but for tiles without overlap."""
    tokenizer = tiny_tokenizer(GRIDS)
    cells = features(tokenizer)
    expected, jumps = tokenizer.decode_features(cells), []
    for overlap in (None, 0):
        wrong = tokenizer.decode_features(cells, tile=16, overlap=overlap) - expected
        steps = wrong.diff(dim=3).abs().mean((0, 1, 2))  # between neighbouring columns; a tile ends at pixel 32
        jumps.append(float(steps[31] / steps.median()))
    assert jumps[0] < 1.5 and jumps[1] > 2


def test_no_more_than_a_tile_at_a_time() -> None:
    """And every cell counts for one."""
    seen = []

    def twice(cells: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(cells.shape[2:]))
        return cells.repeat_interleave(2, 2).repeat_interleave(2, 3)

    cells = torch.rand(2, 3, 5, 13, dtype=torch.float64)
    for tile, overlap in ((4, 1), (4, 4), (1, 0), (1, 1), (5, 2), (12, 3)):
        seen.clear()
        torch.testing.assert_close(in_tiles(twice, cells, tile, overlap), twice(cells))
        assert max(max(shape) for shape in seen[:-1]) <= tile + 2 * overlap


@torch.no_grad()
@pytest.mark.parametrize("kind", ["codebook", "bits"])
def test_generated_pictures(kind: str) -> None:
    """`decode_tile` reaches the decoder, and changes the picture alone."""
    model: Any = tiny_var(subject="block_causal") if kind == "codebook" else tiny_infinity()
    prompts = torch.arange(4) if kind == "codebook" else some_texts()
    options: dict[str, Any] = {"subject": some_subjects(model, 2)} if kind == "codebook" else {}
    whole = model.generate(prompts, **options)
    tiled = model.generate(prompts, decode_tile=2, **options)
    assert torch.equal(tiled.tokens, whole.tokens) and not torch.equal(tiled.images, whole.images)
    cells = model.tokenizer.feature_map(tiled.tokens)
    expected = model.tokenizer.decode_features(cells, tile=2).clamp(-1, 1) * 0.5 + 0.5
    torch.testing.assert_close(tiled.images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^generate: decode_tile: expected at least 1, got 0"):
        model.generate(prompts, decode_tile=0)


@pytest.mark.parametrize("kind", [0, 1], ids=["codebook", "bits"])
def test_decoding_tokens(kind: int) -> None:
    tokenizer = tokenizers()[kind]
    generator = torch.Generator().manual_seed(3)
    tokens = tokenizer.encode(torch.rand(1, 3, *tokenizer.config.image_size, generator=generator))
    cells = tokenizer.feature_map(tokens)
    for options in ({}, {"tile": 16}, {"tile": 16, "overlap": 1}):
        expected = tokenizer.decode_features(cells, **options).clamp(-1, 1)
        assert torch.equal(tokenizer.decode(tokens, **options), expected)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_bits()], ids=["codebook", "bits"])
def test_wrong_tiles(tokenizer: VQTokenizer | BSQTokenizer) -> None:
    cells, name = tokenizer.empty_feature_map(1), type(tokenizer).__name__
    for options, expected in (
        ({"tile": 0}, "tile: expected at least 1, got 0"),
        ({"tile": 2, "overlap": 3}, "overlap: expected 0 to 2, got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {expected}"):
            tokenizer.decode_features(cells, **options)
