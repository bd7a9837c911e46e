"""The multi-scale VQ tokenizer: shapes, rectangles, partial tokens, and the gradients and the loss of its training."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from fastvar.models import VQTokenizer, VQTokenizerConfig
from fastvar.models.autoencoder import ResidualBlock
from tests.helpers.tiny import CHANNELS, CODES, RECTANGLES, SQUARES, some_tokens, tiny_tokenizer

GRIDS = (SQUARES, RECTANGLES, ((1, 1), (3, 2), (5, 4)), ((2, 3),), ((3, 3), (3, 3)))


def some_images(tokenizer: VQTokenizer, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *tokenizer.config.image_size, generator=generator) * 2 - 1


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_shapes(grids: Any) -> None:
    tokenizer = tiny_tokenizer(grids)
    images, schedule = some_images(tokenizer), tokenizer.schedule
    height, width = schedule.finest
    assert images.shape == (2, 3, 2 * height, 2 * width)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, schedule.num_tokens) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < CODES and len(tokens.unique()) > 1
    assert tokenizer.feature_map(tokens).shape == (2, CHANNELS, height, width)
    assert tokenizer.teacher_forcing(tokens).shape == (2, schedule.num_tokens - schedule.lengths[0], CHANNELS)
    assert tokenizer.pyramid(tokens).shape == (2, schedule.num_tokens, CHANNELS)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert tokenizer.encode(images[:0]).shape == (0, schedule.num_tokens)
    assert tokenizer.decode(tokens[:0]).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_quantize_is_all_in_one_go(grids: Any) -> None:
    tokenizer = tiny_tokenizer(grids)
    found = tokenizer.quantize(some_images(tokenizer))
    assert torch.equal(found.tokens, tokenizer.encode(some_images(tokenizer)))
    torch.testing.assert_close(found.feature_map, tokenizer.feature_map(found.tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.teacher_forcing, tokenizer.teacher_forcing(found.tokens), rtol=1e-5, atol=1e-5)


def test_tokens_of_the_first_scales() -> None:
    """They decode, and give the inputs up to their last scale; feature maps refine one another."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(some_images(tokenizer))
    inputs = tokenizer.teacher_forcing(tokens)
    for end, grid in zip(tokenizer.schedule.ends, tokenizer.schedule, strict=True):
        part = tokens[:, :end]
        assert torch.equal(tokenizer.teacher_forcing(part), inputs[:, : end - 1])
        assert tokenizer.decode(part).shape == (2, 3, 6, 6)
        if end < tokens.shape[1]:  # the next input is this feature map, averaged
            following = tokenizer.schedule.grids[tokenizer.schedule.grids.index(grid) + 1]
            mean = F.adaptive_avg_pool2d(tokenizer.feature_map(part), following).flatten(2).mT
            start = end - 1
            torch.testing.assert_close(inputs[:, start : start + mean.shape[1]], mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"num_tokens: expected one of \(1, 5, 14\), got 6"):
        tokenizer.decode(tokens[:, :6])


def test_another_schedule() -> None:
    """As the tokenizer of these grids with the same weights, whose number of scales decides who shares a phi."""
    tokenizer, other = tiny_tokenizer(SQUARES), tiny_tokenizer(((1, 2), (1, 3), (2, 3), (3, 5)))
    schedule = other.schedule
    images = some_images(other, 2)
    found, expected = tokenizer.quantize(images, schedule=schedule), other.quantize(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    tokens = found.tokens
    assert torch.equal(tokenizer.decode(tokens, schedule=schedule), other.decode(tokens))
    assert torch.equal(tokenizer.pyramid(tokens, schedule=schedule), other.pyramid(tokens))
    torch.testing.assert_close(tokenizer.teacher_forcing(tokens, schedule=schedule), other.teacher_forcing(tokens))


def test_pyramid_is_the_complete_feature_map_at_every_scale() -> None:
    tokenizer = tiny_tokenizer()
    tokens = some_tokens(tokenizer, 2)
    feature_map = tokenizer.feature_map(tokens)
    levels = tokenizer.pyramid(tokens).split(tokenizer.schedule.lengths, 1)
    torch.testing.assert_close(levels[0][:, 0], feature_map.mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert torch.equal(levels[-1], feature_map.flatten(2).mT)


@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_residual_convs(count: int) -> None:
    """One for all scales, some shared, one each: all that exist are used, in order."""
    grids = tuple((i, i) for i in (1, 1, 2, 2, 3, 3, 4, 4, 4, 4))
    tokenizer = tiny_tokenizer(grids, residual_convs=count)
    phi = tokenizer.phi
    assert phi.weight.shape == (count, CHANNELS, CHANNELS, 3, 3) and phi.bias.shape == (count, CHANNELS)
    assert len(phi.index) == 10 and sorted(phi.index) == list(phi.index) and set(phi.index) == set(range(count))
    out = tokenizer(some_images(tokenizer))
    out.quantization_loss.backward()
    for gradient in (tokenizer.phi_weight.grad, tokenizer.phi_bias.grad):
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_without_residual_convs() -> None:
    tokenizer = tiny_tokenizer(residual_ratio=0.0)
    assert tokenizer.phi is None and not any("phi" in name for name in tokenizer.state_dict())
    tokens = some_tokens(tokenizer, 1)
    finest = tokenizer.codebook[tokens[:, -9:]].mT.unflatten(2, (3, 3))
    torch.testing.assert_close(tokenizer.feature_map(tokens) - tokenizer.feature_map(tokens[:, :5]), finest)


def test_cosine() -> None:
    """The direction of a code decides alone; with Euclidean distance its length does too."""
    longer = torch.linspace(0.2, 5, CODES)[:, None]
    for cosine in (True, False):
        tokenizer = tiny_tokenizer(((2, 3),), cosine=cosine)
        images = some_images(tokenizer, 8)
        before = tokenizer.encode(images)
        tokenizer.codebook.data.mul_(longer)
        assert torch.equal(tokenizer.encode(images), before) == cosine


def publics_loss(tokenizer: VQTokenizer, features: torch.Tensor) -> torch.Tensor:
    """The loss as FoundationVision/VAR writes it: one loop over the scales, residuals updated in place."""
    beta, schedule, phi = tokenizer.config.commitment_weight, tokenizer.schedule, tokenizer.phi
    frozen = features.detach()
    residual, accumulated = frozen.clone(), torch.zeros_like(frozen)
    loss = torch.zeros(())
    for k, grid in enumerate(schedule):
        rows = F.interpolate(residual, grid, mode="area").permute(0, 2, 3, 1).reshape(-1, CHANNELS)
        index = torch.cdist(rows, tokenizer.codebook.detach()).argmin(1).view(-1, *grid)
        codes = F.embedding(index, tokenizer.codebook).permute(0, 3, 1, 2)
        codes = F.interpolate(codes, schedule.finest, mode="bicubic") if k + 1 < len(schedule) else codes
        if phi is not None:
            weight, bias = phi.weight[phi.index[k]], phi.bias[phi.index[k]]
            codes = codes * (1 - phi.ratio) + F.conv2d(codes, weight, bias, padding=1) * phi.ratio
        accumulated = accumulated + codes
        residual -= codes.detach()
        loss = loss + F.mse_loss(accumulated.detach(), features) * beta + F.mse_loss(accumulated, frozen)
    return loss / len(schedule)


@pytest.mark.parametrize("grids", [SQUARES, RECTANGLES, ((2, 3),)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"residual_ratio": 0.0, "commitment_weight": 2.0}], ids=str)
def test_quantization_loss(grids: Any, fields: dict[str, Any]) -> None:
    """Value and all gradients, of the encoder, the codebook and phi."""
    tokenizer = tiny_tokenizer(grids, **fields)
    images = some_images(tokenizer)
    parameters = [p for name, p in tokenizer.named_parameters() if not name.startswith(("decoder", "post_quant"))]

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, parameters)

    loss = tokenizer(images).quantization_loss
    expected = publics_loss(tokenizer, tokenizer.encode_features(images))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(loss), gradients(expected), strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_straight_through_gradient() -> None:
    """The decoder reads the quantised features; its gradient passes on to the encoder as it is, past the codebook."""
    tokenizer = tiny_tokenizer()
    images, kept = some_images(tokenizer), {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        kept[name] = tensor

    hooks = [
        tokenizer.quant_conv.register_forward_hook(lambda _, __, out: keep("features", out)),
        tokenizer.post_quant_conv.register_forward_pre_hook(lambda _, inputs: keep("decoded", inputs[0])),
    ]
    out = tokenizer(images)
    for hook in hooks:
        hook.remove()
    out.reconstruction.square().sum().backward()
    assert torch.equal(out.tokens, tokenizer.encode(images))
    torch.testing.assert_close(kept["decoded"], tokenizer.feature_map(out.tokens), rtol=1e-5, atol=1e-5)
    assert kept["features"].grad.any() and torch.equal(kept["features"].grad, kept["decoded"].grad)
    assert tokenizer.codebook.grad is None and tokenizer.phi_weight.grad is None
    assert all(p.grad.any() for p in tokenizer.encoder.parameters())


def test_a_few_steps_learn_a_batch() -> None:
    tokenizer = tiny_tokenizer().train()
    images = some_images(tokenizer, 4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        out = tokenizer(images)
        loss = F.mse_loss(out.reconstruction, images) + out.quantization_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("attention", [True, False])
def test_state_dict_round_trip(attention: bool) -> None:
    tokenizer = tiny_tokenizer(attention=attention)
    file = io.BytesIO()
    torch.save(tokenizer.state_dict(), file)
    file.seek(0)
    other = tiny_tokenizer(seed=9, attention=attention)
    images = some_images(tokenizer)
    assert not torch.equal(other.encode(images), tokenizer.encode(images))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.encode(images), tokenizer.encode(images))
    assert torch.equal(other.decode(other.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_wrong_images() -> None:
    tokenizer = tiny_tokenizer(RECTANGLES)
    for shape in ((2, 3, 6, 4), (2, 3, 4, 5), (2, 1, 4, 6), (3, 4, 6)):
        for call in (tokenizer.encode, tokenizer.quantize, tokenizer.forward):
            with pytest.raises(ValueError, match=r"VQTokenizer: images: expected \(B, 3, 4, 6\), got"):
                call(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images: expected floating-point numbers in \[-1, 1\], got torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (r"norm_groups: expected a divisor of all widths \[8, 16\], got 3", {"norm_groups": 3}),
        ("residual_convs: expected at least 1, got 0", {"residual_convs": 0}),
        (r"residual_ratio: expected 0 to 1, got -0.5", {"residual_ratio": -0.5}),
    ],
)
def test_wrong_config(message: str, fields: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 2), "norm_groups": 4, "residual_convs": 2}
    with pytest.raises(ValueError, match=f"VQTokenizerConfig: {message}"):
        VQTokenizerConfig(grids=SQUARES, **{**shape, **fields})


def test_chroma_gain_changes_what_the_networks_see_and_is_undone() -> None:
    """Grey images are untouched by it; colour reaches the encoder enlarged and leaves the decoder reduced."""
    plain, gained = (tiny_tokenizer(chroma_gain=gain) for gain in (1.0, 4.0))
    gained.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, *plain.config.image_size) * 2 - 1
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert torch.allclose(plain.encode_features(grey), gained.encode_features(grey), atol=1e-5)
    seen = grey + 4 * (images - grey)
    torch.testing.assert_close(gained.encode_features(images), plain.encode_features(seen), rtol=1e-4, atol=1e-4)
    features = plain.encode_features(images)
    made, reduced = plain.decode_features(features), gained.decode_features(features)
    torch.testing.assert_close(reduced, made.mean(1, keepdim=True) + (made - made.mean(1, keepdim=True)) / 4)
    with pytest.raises(ValueError, match="chroma_gain: expected above 0"):
        tiny_tokenizer(chroma_gain=0.0)


def test_decoding_in_bfloat16_gives_the_same_picture() -> None:
    """To within 40 dB of what it varies over; the weights stay as they are, and no token depends on it."""
    tokenizer = tiny_tokenizer()
    feature_map = tokenizer.feature_map(some_tokens(tokenizer, 4))
    with torch.no_grad():
        exact, low = (
            tokenizer.decode_features(feature_map),
            tokenizer.decode_features(feature_map, dtype=torch.bfloat16),
        )
    assert low.dtype == torch.bfloat16 and not torch.equal(low.float(), exact)
    error = (low.float() - exact).square().mean().sqrt() / (exact.amax() - exact.amin())
    assert error < 1e-2
    tokens = some_tokens(tokenizer, 2)
    torch.testing.assert_close(
        tokenizer.decode(tokens, dtype=torch.bfloat16).float(), tokenizer.decode(tokens), rtol=0, atol=0.1
    )


def test_weights_and_images_lie_channels_last_inside_and_plain_outside() -> None:
    tokenizer = tiny_tokenizer()
    seen = []
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(2, 3, *tokenizer.config.image_size)
    with torch.no_grad():
        features = tokenizer.encode_features(images)
        assert tokenizer.decode_features(features).is_contiguous() and features.is_contiguous()
    assert seen and all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)


@pytest.mark.parametrize("changed", ["", "hook", "pre-hook", "padding", "forward"])
def test_a_changed_convolution_runs_itself(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """On a GPU, without gradients, a block computes its first convolution from the weights, unless someone changed it.
    What the tensors of a GPU do is left out here: their shapes alone are computed."""
    called = []
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            block = ResidualBlock(8, 8, norm_groups=4, dropout=0.0)
            x = torch.zeros(1, 8, 4, 4)
        if changed == "hook":
            block.conv1.register_forward_hook(lambda *_: called.append("conv1"))
        elif changed == "pre-hook":
            block.conv1.register_forward_pre_hook(lambda *_: called.append("conv1"))
        elif changed == "padding":
            block.conv1.padding_mode = "reflect"
        plain = torch.nn.Conv2d.forward
        monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda conv, x: (called.append("forward"), plain(conv, x))[1])
        if changed == "forward":
            block.conv1.forward = lambda x: torch.nn.Conv2d.forward(block.conv1, x)
        assert block(x).shape == x.shape
    assert bool(called) == bool(changed)
