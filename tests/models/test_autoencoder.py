"""What encoder and decoder do otherwise on a GPU: biases are carried along, few channels padded, images copied less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar.models import VQTokenizer, VQTokenizerConfig, autoencoder
from fastvar.models.autoencoder import Encoder, ResidualBlock
from tests.helpers.tiny import CHANNELS, tiny_tokenizer
from tests.helpers.waits import GPU

SHAPE: dict[str, Any] = {"channel_multipliers": (1, 2, 2), "blocks_per_level": 2}
Both = tuple[torch.Tensor, torch.Tensor]


def both_ways(tokenizer: VQTokenizer, batch: int = 2) -> Both:
    """Features of images, and images of features."""
    generator = torch.Generator().manual_seed(0)
    dtype, (height, width) = tokenizer.codebook.dtype, tokenizer.schedule.finest
    images = torch.rand(batch, 3, *tokenizer.config.image_size, generator=generator, dtype=dtype)
    features = torch.randn(batch, CHANNELS, height, width, generator=generator, dtype=dtype)
    return tokenizer.encode_features(images), tokenizer.decode_features(features)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(autoencoder, "_on_gpu", lambda x: True)


@pytest.mark.parametrize("grids", [((3, 3),), ((2, 3),), ((1, 1),)], ids=str)
@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_same_results(grids: Any, attention: bool, as_on_gpu: Callable[[], None]) -> None:
    """Also at the borders, where what is carried along meets padding."""
    tokenizer = tiny_tokenizer(grids, attention=attention, **SHAPE).double()
    expected = both_ways(tokenizer)
    as_on_gpu()
    torch.testing.assert_close(both_ways(tokenizer), expected, rtol=1e-9, atol=1e-9)
    assert all(out.is_contiguous() for out in both_ways(tokenizer))
    assert [len(out) for out in both_ways(tokenizer, batch=0)] == [0, 0]


@torch.no_grad()
def test_same_results_in_bfloat16(as_on_gpu: Callable[[], None]) -> None:
    """As far from float32 as before."""
    tokenizer = tiny_tokenizer(((4, 4),), **SHAPE)
    features = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))
    exact = tokenizer.decode_features(features)
    before = tokenizer.decode_features(features, dtype=torch.bfloat16)
    as_on_gpu()
    found = tokenizer.decode_features(features, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16 and not torch.equal(found, before)
    assert (found - exact).square().mean() < 1.2 * (before - exact).square().mean()


def test_same_gradients(as_on_gpu: Callable[[], None]) -> None:
    """Of the images' convolution too, whose three channels are padded."""
    tokenizer = tiny_tokenizer(**SHAPE).double()
    parameters = [p for name, p in tokenizer.named_parameters() if name not in ("codebook", "phi_weight", "phi_bias")]
    found = []
    for prepare in (lambda: None, as_on_gpu):
        prepare()
        loss = sum(out.square().sum() for out in both_ways(tokenizer))
        found.append(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert all(gradient.any() for gradient in found[1])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Identity, autoencoder._Stage], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_hooks_see_all_that_was_carried(kind: type[nn.Module], as_on_gpu: Callable[[], None]) -> None:
    tokenizer = tiny_tokenizer(**SHAPE).double()
    seen: list[torch.Tensor] = []
    for module in (*tokenizer.encoder.modules(), *tokenizer.decoder.modules()):
        if isinstance(module, kind):
            module.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    both_ways(tokenizer)
    expected, count = seen[:], len(seen)
    as_on_gpu()
    both_ways(tokenizer)
    assert count > 10
    torch.testing.assert_close(seen[count:], expected, rtol=1e-9, atol=1e-9)


class _Operators(TorchDispatchMode):
    """Counts operators whose result is as large as the least image inside."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.counts = least, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.numel() >= self.least:
            self.counts[name] += 1
            if name == "convolution":
                weight, bias = args[1:3]
                self.counts["with a bias"] += bias is not None
                self.counts["of few channels"] += len(weight) % 8 != 0
        return out


def test_operators_on_a_gpu() -> None:
    """No bias has a pass of its own, but those of queries, keys and values; nor has padding."""
    with FakeTensorMode(), torch.no_grad():
        with GPU:
            config = VQTokenizerConfig(((4, 4),), vocab_size=8, code_channels=8, channels=8, norm_groups=4, **SHAPE)
            tokenizer = VQTokenizer(config).requires_grad_(False)
            images, features = torch.zeros(64, 3, 16, 16), torch.zeros(64, 8, 4, 4)
        found = []
        for call in (lambda: tokenizer.encode_features(images), lambda: tokenizer.decode_features(features)):
            with _Operators(64 * 8 * 4 * 4) as operators:
                call()
            found.append(operators.counts)
    encode, decode = found
    assert encode["with a bias"] == 3 + 1 and decode["with a bias"] == 4 + 1, found  # and beside the quantiser
    assert encode["add"] == 8 + 3 + 2 + 1, found  # blocks, attentions, downsamplings and the last convolution
    assert decode["add"] == 11 + 4 + 2 + 1, found  # the same of upsamplings
    assert not encode["of few channels"] and not decode["of few channels"], found
    assert not {"constant_pad_nd", "upsample_nearest2d", "add_", "fill_"} & (set(encode) | set(decode)), found


def test_backward_hooks_and_other_forwards_are_called(as_on_gpu: Callable[[], None]) -> None:
    as_on_gpu()
    tokenizer = tiny_tokenizer(((3, 3),), **SHAPE)
    blocks = [module for module in tokenizer.modules() if isinstance(module, ResidualBlock)]
    called: list[str] = []
    handles = [block.register_full_backward_hook(lambda *_: called.append("backward")) for block in blocks]
    features = torch.randn(1, CHANNELS, 3, 3, requires_grad=True)
    tokenizer.decode_features(features).sum().backward()
    decoder = sum(isinstance(module, ResidualBlock) for module in tokenizer.decoder.modules())
    assert called == ["backward"] * decoder
    for handle in handles:
        handle.remove()
    forward = blocks[-1].forward
    blocks[-1].forward = lambda x: called.append("forward") or forward(x)  # type: ignore[func-returns-value,method-assign]
    with torch.no_grad():
        tokenizer.decode_features(features)
    assert called[decoder:] == ["forward"]


@torch.no_grad()
def test_odd_sizes(as_on_gpu: Callable[[], None]) -> None:
    encoder = Encoder(8, (1, 2), 4, norm_groups=4).double()
    for size in ((5, 5), (6, 7), (6, 8)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autoencoder, "_on_gpu", lambda x: False)
            expected = encoder(x)
        as_on_gpu()
        torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)
