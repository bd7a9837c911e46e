"""The bitwise tokenizer: shapes, rectangles, patches, self-correction, and the gradients and losses of its training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.models import BSQTokenizer, BSQTokenizerConfig, self_correction
from fastvar.schedule import ScaleSchedule
from tests.helpers.tiny import RECTANGLES, SQUARES, some_bits, tiny_bits

CASES: dict[str, dict[str, Any]] = {
    "squares": {},
    "rectangles": {"grids": RECTANGLES},
    "one scale": {"grids": ((2, 3),)},
    "patches": {"patchify": True},
    "patches in rectangles": {"patchify": True, "grids": ((1, 1), (3, 2), (5, 4))},
}


@pytest.fixture(params=CASES)
def tokenizer(request: pytest.FixtureRequest) -> BSQTokenizer:
    return tiny_bits(**CASES[request.param])


def some_images(tokenizer: BSQTokenizer, count: int = 2, schedule: ScaleSchedule | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(count, 3, *tokenizer.config.image_size_of(schedule or tokenizer.schedule), generator=generator) * 2
        - 1
    )


def test_shapes(tokenizer: BSQTokenizer) -> None:
    images, schedule = some_images(tokenizer), tokenizer.schedule
    length, first, bits = schedule.num_tokens, schedule.lengths[0], tokenizer.config.bits
    found = tokenizer.encode(images)
    assert found.shape == (2, length, bits) and found.dtype == torch.bool and found.any() and not found.all()
    assert tokenizer.teacher_forcing(found).shape == (2, length - first, bits)
    assert tokenizer.pyramid(found).shape == (2, length, bits)
    decoded = tokenizer.decode(found)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert tokenizer.encode(images[:0]).shape == (0, length, bits)
    assert tokenizer.decode(found[:0]).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("next_input", ["bilinear", "area"])
def test_quantize_is_all_in_one_go(tokenizer: BSQTokenizer, next_input: str) -> None:
    found = tokenizer.quantize(some_images(tokenizer), next_input=next_input)
    assert torch.equal(found.bits, tokenizer.encode(some_images(tokenizer)))
    torch.testing.assert_close(found.feature_map, tokenizer.feature_map(found.bits), rtol=1e-5, atol=1e-5)
    inputs = tokenizer.teacher_forcing(found.bits, next_input)
    torch.testing.assert_close(found.teacher_forcing, inputs, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokenizer.teacher_forcing(found.bits.to(torch.uint8), next_input), inputs)


def test_how_the_next_input_is_made() -> None:
    """The argument goes before the config's choice, which is the bilinear one."""
    grids = ((1, 1), (2, 2), (3, 3), (5, 5))
    bits = some_bits(tiny_bits(grids), 2)
    ways = [tiny_bits(grids).teacher_forcing(bits, way) for way in ("bilinear", "area")]
    assert not torch.equal(*ways)
    assert torch.equal(tiny_bits(grids).teacher_forcing(bits), ways[0])
    area = tiny_bits(grids, next_input="area")
    assert torch.equal(area.teacher_forcing(bits), ways[1])
    assert torch.equal(
        area.quantize(some_images(area)).teacher_forcing, area.teacher_forcing(area.encode(some_images(area)))
    )


def test_bits_of_the_first_scales() -> None:
    tokenizer = tiny_bits()
    bits = tokenizer.encode(some_images(tokenizer))
    inputs = tokenizer.teacher_forcing(bits)
    for end in tokenizer.schedule.ends:
        assert torch.equal(tokenizer.teacher_forcing(bits[:, :end]), inputs[:, : end - 1])
        assert tokenizer.decode(bits[:, :end]).shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"num_tokens: expected one of \(1, 5, 14\), got 6"):
        tokenizer.decode(bits[:, :6])


def test_patches_are_those_of_pixel_unshuffle() -> None:
    """The same weights on twice the grid, with a quarter of the bits a token."""
    tokenizer, grids = tiny_bits(patchify=True), tuple((2 * h, 2 * w) for h, w in SQUARES)
    cells = BSQTokenizer(BSQTokenizerConfig(**{**vars(tokenizer.config), "patchify": False, "bits": 2, "grids": grids}))
    cells.load_state_dict(tokenizer.state_dict())
    images = some_images(tokenizer)
    one, other = tokenizer.quantize(images), cells.eval().quantize(images)

    def patched(rows: torch.Tensor, first: int) -> torch.Tensor:
        parts = rows.split([h * w for h, w in grids[first:]], 1)
        maps = [part.mT.unflatten(2, grid) for part, grid in zip(parts, grids[first:], strict=True)]
        return torch.cat([F.pixel_unshuffle(each, 2).flatten(2).mT for each in maps], 1)

    assert torch.equal(one.bits, patched(other.bits.float(), 0).bool())
    assert torch.equal(one.teacher_forcing, patched(other.teacher_forcing, 1))
    assert torch.equal(one.feature_map, other.feature_map)
    assert torch.equal(tokenizer.pyramid(one.bits), patched(cells.pyramid(other.bits), 0))
    assert torch.equal(tokenizer.decode(one.bits), cells.decode(other.bits))


def test_pyramid_is_the_complete_feature_map_at_every_scale() -> None:
    tokenizer = tiny_bits()
    bits = some_bits(tokenizer, 2)
    feature_map, pyramid = tokenizer.feature_map(bits), tokenizer.pyramid(bits)
    torch.testing.assert_close(pyramid[:, 0], feature_map.mean((2, 3)))
    assert torch.equal(pyramid[:, -9:], feature_map.flatten(2).mT)


def test_another_schedule() -> None:
    """Images of another size, with the weights of this one."""
    tokenizer, schedule = tiny_bits(), ScaleSchedule(((1, 1), (2, 1), (4, 3)))
    other = tiny_bits(schedule.grids)
    images = some_images(tokenizer, schedule=schedule)
    found, expected = tokenizer.quantize(images, schedule=schedule), other.quantize(images)
    assert torch.equal(found.bits, expected.bits) and torch.equal(found.teacher_forcing, expected.teacher_forcing)
    for method in ("teacher_forcing", "feature_map", "pyramid", "decode"):
        got = getattr(tokenizer, method)(found.bits, schedule=schedule)
        assert torch.equal(got, getattr(other, method)(found.bits)), method
    out, same = tokenizer(images, schedule=schedule), other(images)
    assert torch.equal(out.reconstruction, same.reconstruction) and out.quantization_loss == same.quantization_loss


def test_wrong_arguments() -> None:
    tokenizer = tiny_bits()
    for images, expected in [
        (torch.zeros(1, 3, 6, 8), r"expected \(B, 3, 6, 6\), got \(1, 3, 6, 8\)"),
        ([1.0], r"expected floating-point numbers in \[-1, 1\], got list"),
        (torch.zeros(1, 3, 6, 6, dtype=torch.uint8), r"expected floating-point numbers in \[-1, 1\], got torch\.uint8"),
    ]:
        with pytest.raises(ValueError, match=f"BSQTokenizer: images: {expected}"):
            tokenizer.encode(images)
    for bits in (torch.zeros(1, 14, 7, dtype=torch.bool), torch.zeros(1, 14, 8), torch.zeros(14, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"BSQTokenizer: bits: expected bits \(B, L, 8\), got "):
            tokenizer.decode(bits)
    for fields, expected in (
        ({"norm_groups": 3}, r"norm_groups: expected a divisor of all widths \[8, 16\], got 3"),
        ({"patchify": True, "bits": 6}, "bits: expected a multiple of 4 with patchify, got 6"),
        ({"next_input": "nearest"}, r"next_input: expected one of \('bilinear', 'area'\), got 'nearest'"),
        ({"channel_multipliers": ()}, "channel_multipliers: expected at least one"),
    ):
        with pytest.raises(ValueError, match=f"BSQTokenizerConfig: {expected}"):
            tiny_bits(**fields)


def test_encoding_knows_no_autocast() -> None:
    tokenizer = tiny_bits()
    images = some_images(tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokenizer.encode(images.clone()))
        found = tokenizer.quantize(images)
    assert torch.equal(found.feature_map, tokenizer.quantize(images).feature_map)


def test_decoding_in_half_the_precision() -> None:
    tokenizer = tiny_bits()
    bits = some_bits(tokenizer, 2)
    low, high = tokenizer.decode(bits, dtype=torch.bfloat16), tokenizer.decode(bits)
    assert not torch.equal(low.float(), high)
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.1)


def test_self_correction_flips_before_the_next_scale() -> None:
    """All bits of the second scale flipped: the inputs are those of the flipped bits, the labels what corrects them."""
    tokenizer = tiny_bits()
    images, (start, end) = some_images(tokenizer), (1, 5)
    plain = tokenizer.quantize(images)
    flipped = tokenizer.quantize(images, flip_probability=[0.0, 1.0, 0.0])
    sent = flipped.bits.clone()
    sent[:, start:end] ^= True
    torch.testing.assert_close(flipped.teacher_forcing, tokenizer.teacher_forcing(sent), rtol=1e-5, atol=1e-5)
    assert torch.equal(flipped.bits[:, :end], plain.bits[:, :end])
    assert not torch.equal(flipped.bits[:, end:], plain.bits[:, end:])
    some = [tokenizer.quantize(images, flip_probability=[0.5] * 3, seed=seed).teacher_forcing for seed in (1, 1, 2)]
    assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])
    alone = tokenizer.quantize(images[1:], flip_probability=[0.5] * 3, seed=1, first_image=1)
    torch.testing.assert_close(alone.teacher_forcing, some[0][1:])


def test_strengths_of_self_correction() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [self_correction(15, generator=generator) for _ in range(300)]
    first = [strength for strengths in drawn for strength in strengths[:13]]
    assert set(first) == {percent / 100 for percent in range(31)}
    assert all(strengths[13:] == [0, 0] for strengths in drawn)
    assert self_correction(3, strength=0.0) == [0, 0, 0]
    with pytest.raises(ValueError, match="self_correction: strength: expected 0 to 1, got 30"):
        self_correction(3, strength=30)


def test_training_pass(tokenizer: BSQTokenizer) -> None:
    """Its bits are those of encoding and its reconstruction is their decoding; every weight gets a gradient."""
    images = some_images(tokenizer)
    out = tokenizer(images)
    assert torch.equal(out.tokens, tokenizer.encode(images))
    torch.testing.assert_close(out.reconstruction.clamp(-1, 1), tokenizer.decode(out.tokens), rtol=1e-4, atol=1e-4)
    channels = tokenizer.config.feature_channels
    assert out.usage.shape == (2 * channels,)
    assert int(out.usage.sum()) == out.tokens.numel() and int(out.usage[channels:].sum()) == int(out.tokens.sum())
    (out.reconstruction.square().mean() + out.quantization_loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in tokenizer.parameters())


def test_losses_by_definition() -> None:
    """In float64, scale by scale: what the encoder gets from the reconstruction, from commitment and from entropy."""
    tokenizer = tiny_bits(commitment_weight=0.7, entropy_weight=0.3).double()
    images = some_images(tokenizer).double()
    features = tokenizer.encode_features(images).detach().requires_grad_()
    tokenizer.encode_features = lambda images, schedule=None: features  # type: ignore[method-assign]
    out = tokenizer(images)
    got = torch.autograd.grad(out.reconstruction.square().mean() + out.quantization_loss, features)[0]

    summed, losses = torch.zeros_like(features), []
    for h, w in tokenizer.schedule:
        residual = F.adaptive_avg_pool2d(features - summed.detach(), (h, w))
        unit = residual / residual.norm(dim=1, keepdim=True)
        code = residual.sign() * 8**-0.5
        summed = summed + F.interpolate(unit - unit.detach() + code, (3, 3), mode="bilinear")
        logits = (4 * 100 * unit / 8**0.5).movedim(1, -1).reshape(-1, 8)
        chance, sure, unsure = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
        each = -(chance * sure + (1 - chance) * unsure).sum(1).mean()
        mean = chance.mean(0).clamp(1e-7, 1 - 1e-7)
        together = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).sum()
        commitment = ((unit - code) ** 2).sum(1).mean()
        losses.append(0.7 * commitment + 0.3 * (each - together) / 100)
    expected_loss = torch.stack(losses).mean()
    torch.testing.assert_close(out.quantization_loss, expected_loss, rtol=1e-9, atol=1e-12)
    reconstruction = tokenizer.decode_features(summed)
    torch.testing.assert_close(out.reconstruction, reconstruction)
    expected = torch.autograd.grad(reconstruction.square().mean() + expected_loss, features)[0]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)


def test_it_learns() -> None:
    torch.manual_seed(0)
    tokenizer = BSQTokenizer(tiny_bits().config)
    images = some_images(tokenizer, 4)
    losses = []
    for _ in range(15):
        out = tokenizer(images)
        losses.append(F.mse_loss(out.reconstruction, images))
        gradients = torch.autograd.grad(losses[-1] + out.quantization_loss, list(tokenizer.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(tokenizer.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    assert losses[-1] < 0.8 * losses[0]


def test_saving(tmp_path: Path) -> None:
    tokenizer = tiny_bits(RECTANGLES, patchify=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = BSQTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config and not loaded.training
    assert torch.equal(loaded.encode(some_images(tokenizer)), tokenizer.encode(some_images(tokenizer)))
    buffer = io.BytesIO()
    torch.save(tokenizer, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).config == tokenizer.config
