"""The Infinity transformer in teacher forcing: what depends on what, texts of several lengths, gradients, the loss."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.models import VAR, Infinity, InfinityConfig, TextFeatures, bitwise_loss, rotation_grid, scale_weights
from fastvar.schedule import PRESETS, ScaleSchedule, infinity_schedule
from tests.helpers.tiny import RECTANGLES, SQUARES, some_bits, some_texts, tiny_bits, tiny_infinity

GRIDS = (SQUARES, ((1, 1), (3, 2), (5, 4)), ((1, 1),))


def some_inputs(net: Infinity, count: int = 4) -> torch.Tensor:
    return net.tokenizer.teacher_forcing(some_bits(net, count))


@torch.no_grad()
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_a_token_depends_on_coarser_scales_alone(grids: Any) -> None:
    net = tiny_infinity(grids)
    inputs = some_inputs(net)
    logits = net(some_texts(), inputs)
    assert logits.shape == (4, net.schedule.num_tokens, 8) and logits.dtype == torch.float32 and logits.std() > 0.1
    for start, end in zip(net.schedule.starts[1:], net.schedule.ends[1:], strict=True):
        changed = inputs.clone()
        changed[:, end - 2] += 1  # a token's input, the first one has none
        found = net(some_texts(), changed)
        torch.testing.assert_close(found[:, :start], logits[:, :start])
        assert (found[:, start:end] - logits[:, start:end]).abs().amax(2).min() > 1e-6  # its whole scale sees it
        torch.testing.assert_close(net(some_texts(), inputs[:, : end - 1]), logits[:, :end])


@torch.no_grad()
def test_texts_of_several_lengths() -> None:
    """Each image reads its own text, the same alone and beside others, and all of its rows in their order."""
    net = tiny_infinity()
    texts, inputs = some_texts(), some_inputs(net)
    together = net(texts, inputs)
    for i in range(4):
        alone = net(texts.some(slice(i, i + 1)), inputs[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])
    first = 0
    for i, length in enumerate(texts.lengths):
        for row in range(first, first + length):
            packed = texts.packed.clone()
            packed[row] += 1
            differs = (net(TextFeatures(packed, texts.lengths), inputs) - together).abs().amax((1, 2)) > 1e-5
            assert differs.tolist() == [j == i for j in range(4)]
        first += length
    same = TextFeatures(texts.packed[:8], (2, 2, 2, 2))
    padded = net(TextFeatures.joined([same, some_texts((5,))]), torch.cat([inputs, inputs[:1]]))
    torch.testing.assert_close(net(same, inputs), padded[:4])


def test_positions_are_rotary() -> None:
    """Within a scale only the input and the position tell tokens apart."""
    net = tiny_infinity(((1, 1), (2, 2)))
    logits = net(some_texts((2,)), torch.ones(1, 4, 8))
    assert len({tuple(row.tolist()) for row in logits[0, 1:].detach().round(decimals=5)}) == 4


def test_grids_of_rotary_positions() -> None:
    """Those of the 1M budget for Infinity's schedules, each of which is there once for a budget and ratio."""
    for name, schedule in PRESETS.items():
        if name.startswith("infinity-"):
            assert rotation_grid(schedule) == PRESETS[f"infinity-1M-{name.rsplit('-', 1)[1]}"].finest
    assert rotation_grid(infinity_schedule("0.06M", "0.666")) == (52, 78)
    assert rotation_grid(ScaleSchedule(SQUARES)) == (3, 3)


@torch.no_grad()
def test_another_schedule() -> None:
    net, schedule = tiny_infinity(), ScaleSchedule(((1, 1), (1, 2), (2, 5)))
    other = tiny_infinity(schedule.grids)
    inputs = other.tokenizer.teacher_forcing(some_bits(other, 4))
    assert torch.equal(net(some_texts(), inputs, schedule=schedule), other(some_texts(), inputs))
    with pytest.raises(ValueError, match="Infinity: grids: expected 1 token first, got 2"):
        net(some_texts(), inputs, schedule=ScaleSchedule(RECTANGLES))
    with pytest.raises(ValueError, match="Infinity: grids: expected at most 15 scales, got 16"):
        net(some_texts(), inputs, schedule=ScaleSchedule((1,) * 16))


def test_wrong_arguments() -> None:
    net = tiny_infinity()
    inputs = some_inputs(net)
    packed = some_texts().packed
    for texts, expected in [
        (TextFeatures(packed[:, :5], (3, 1, 6, 2)), r"packed features \(sum of lengths, 12\), got \(12, 5\)"),
        (TextFeatures(packed, (3, 1, 7, 1)), r"lengths from 1 to 6 that add up to 12, got \(3, 1, 7, 1\)"),
        (TextFeatures(packed, (3, 0, 6, 3)), r"lengths from 1 to 6 that add up to 12, got \(3, 0, 6, 3\)"),
        (TextFeatures(packed, (3, 1, 6, 1)), r"lengths from 1 to 6 that add up to 12, got \(3, 1, 6, 1\)"),
        (some_texts((3, 1)), r"one per row of inputs \(4\), got 2"),
        ("a text", "a list of texts, got the text 'a text'"),
    ]:
        with pytest.raises(ValueError, match=f"Infinity: texts: expected {expected}"):
            net(texts, inputs)
    with pytest.raises(ValueError, match=r"Infinity: inputs: expected \(B, n, 8\) with n one of 0, 4, 13, got"):
        net(some_texts(), inputs[:, :5])
    with pytest.raises(RuntimeError, match="Infinity: text_encoder: none attached"):
        net(["a", "b", "c", "d"], inputs)
    for fields, expected in (
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim 32, got 3"),
        ({"num_heads": 16}, "num_heads: expected heads of a multiple of 4 channels, got 2"),
    ):
        with pytest.raises(ValueError, match=f"InfinityConfig: {expected}"):
            tiny_infinity(**fields)
    with pytest.raises(ValueError, match="Infinity: tokenizer: expected bits 8, got 16"):
        Infinity(net.config, tiny_bits(bits=16))


def test_texts_are_encoded() -> None:
    net, asked = tiny_infinity(), []

    def encoder(texts: Any) -> TextFeatures:
        asked.append(list(texts))
        return some_texts()

    net.text_encoder = encoder
    assert torch.equal(net(["a", "b", "c", "d"], some_inputs(net)), net(some_texts(), some_inputs(net)))
    assert asked == [["a", "b", "c", "d"]] and "text_encoder" not in dict(net.named_modules())
    out = net.generate(["a", "b", "c", "d"], decode=False)
    assert torch.equal(out.tokens, net.generate(some_texts(), decode=False).tokens)


def test_a_text_encoder_is_no_submodule() -> None:
    """Be it a module, passed or set; None detaches it."""
    encoder, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    net = Infinity(tiny_infinity().config, text_encoder=encoder)  # type: ignore[arg-type]
    names = set(net.state_dict())
    assert net.text_encoder is encoder and encoder not in net.modules() and names == set(tiny_infinity().state_dict())
    net.text_encoder = other
    assert net.text_encoder is other and other not in net.modules() and set(net.state_dict()) == names
    net.text_encoder = None
    with pytest.raises(RuntimeError, match="Infinity: text_encoder: none attached"):
        _ = net.text_encoder


def test_texts_are_encoded_by_batches() -> None:
    """No more at a time than are drawn, once what is no text was refused."""
    net, asked = tiny_infinity(), []

    def encoder(texts: Any) -> TextFeatures:
        asked.append(list(texts))
        return TextFeatures.joined([some_texts((len(text),)) for text in texts])

    net.text_encoder = encoder
    for wrong in (["a", "b", 3], "a text"):
        with pytest.raises(ValueError, match=r"^Infinity: texts: expected a list of texts, got "):
            net.batches(wrong, 2)
    assert asked == []
    batches = net.batches(["a", "bc", "def", "g", "hi"], 2)
    assert asked == [["a", "bc"], ["def", "g"], ["hi"]] and [b.lengths for b in batches] == [(1, 2), (3, 1), (2,)]
    assert [b.lengths for b in net.batches(some_texts(), 3)] == [(3, 1, 6), (2,)] and net.batches([], 2) == []


def test_gradients() -> None:
    """Against float64, of every parameter, those of a text that is dropped included; checkpointing changes nothing."""
    net = tiny_infinity(condition_dropout=0.5)
    inputs, bits = some_inputs(net), some_bits(net, 4)

    def gradients(model: Infinity, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.train()
        loss = bitwise_loss(model(some_texts(), inputs.to(dtype)), bits, scale_weights(net.schedule))
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    single = gradients(net, torch.float32)
    net.gradient_checkpointing = True
    again = gradients(net, torch.float32)
    exact = gradients(copy.deepcopy(net).double(), torch.float64)
    for name, expected in exact.items():
        assert expected.any(), name
        torch.testing.assert_close(single[name].double(), expected, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(again[name], single[name], msg=name)


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_recomputation_draws_the_same(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is drawn, the state of random numbers is not asked for: while a graph is captured it is not
    there."""
    net = tiny_infinity(drop_path=rate, condition_dropout=0.0).train()
    inputs, found = some_inputs(net), []
    for net.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        with monkeypatch.context() as patched:
            if not rate:
                patched.delattr(torch, "get_rng_state")
            loss = net(some_texts(), inputs).square().mean()
            found.append(torch.autograd.grad(loss, net.code_embed.weight)[0])
    assert torch.equal(*found)


def test_texts_are_dropped_in_training() -> None:
    """A dropped text reads like the learned one that says nothing, of its own length."""
    net = tiny_infinity(condition_dropout=1.0)
    inputs = some_inputs(net)
    with torch.no_grad():
        nothing = net(net.no_text((3, 1, 6, 2)), inputs)
        assert not torch.allclose(net(some_texts(), inputs), nothing)
        torch.testing.assert_close(net.train()(some_texts(), inputs), nothing)
        kept = tiny_infinity(condition_dropout=0.0)
        torch.testing.assert_close(kept.train()(some_texts(), inputs), kept.eval()(some_texts(), inputs))


def test_the_loss() -> None:
    """Cross-entropy over two logits, in float64; far from 0 too."""
    generator = torch.Generator().manual_seed(0)
    schedule = ScaleSchedule(SQUARES)
    logits = torch.randn(3, 14, 8, generator=generator, dtype=torch.float64) * 30
    bits = torch.rand(3, 14, 8, generator=generator) < 0.5
    pairs = torch.stack([torch.zeros_like(logits), logits], 1)
    each = torch.nn.functional.cross_entropy(pairs, bits.long(), reduction="none").mean(2)
    torch.testing.assert_close(bitwise_loss(logits, bits), each.mean())
    area = torch.tensor([1.0] + [4.0] * 4 + [9.0] * 9).double()
    weights = (9 / area).sqrt() / (9 / area).sqrt().sum()
    torch.testing.assert_close(scale_weights(schedule).double(), weights)
    got = bitwise_loss(logits, bits.to(torch.uint8), scale_weights(schedule))
    torch.testing.assert_close(got, (each * weights).sum(1).mean(), rtol=1e-6, atol=0)
    single = logits.float().requires_grad_()
    exact = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(bitwise_loss(single, bits, scale_weights(schedule)), single)
    (expected,) = torch.autograd.grad((bitwise_loss(exact, bits, weights)), exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-9)
    for wrong in (bits[:, :5], bits.float()):
        with pytest.raises(ValueError, match=r"bitwise_loss: bits: expected bits \(3, 14, 8\)"):
            bitwise_loss(logits, wrong)
    with pytest.raises(ValueError, match=r"bitwise_loss: weights: expected \(14,\), got \(3,\)"):
        bitwise_loss(logits, bits, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    net = tiny_infinity()
    inputs, bits = some_inputs(net), some_bits(net, 4)
    exact = net(some_texts(), inputs, bits=bits).log_probs
    net.to(dtype)
    found = net(some_texts(), inputs, bits=bits).log_probs
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.15)
    (-found.mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters() if p is not net.null_text)


def test_named_shapes() -> None:
    """Parameters of the public sizes; their heads have one logit a bit where the public ones have two."""
    public = {
        "layer12": 125_185_696,
        "layer16": 361_633_792,
        "layer24": 940_944_832,
        "2b": 2_204_564_032,
        "8b": 8_375_791_824,
    }
    for name, count in public.items():
        config = InfinityConfig.named(name)
        with torch.device("meta"):
            net = Infinity(config)
        head = config.bits * (config.embed_dim + 1)
        assert sum(p.numel() for p in net.parameters()) + head == count
    heads = {name: InfinityConfig.named(name).head_dim for name in ("layer32", "layer40", "layer48", "20b")}
    assert heads == {"layer32": 104, "layer40": 112, "layer48": 120, "20b": 128}
    assert InfinityConfig.named("2b", depth=3).depth == 3
    with pytest.raises(ValueError, match=r"InfinityConfig\.named: name: expected one of .*'2b'.*, got '3b'"):
        InfinityConfig.named("3b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving(tmp_path: Path, dtype: torch.dtype) -> None:
    """The config, every weight to the bit and in its dtype, and the tokenizer with it; ready to sample."""
    net = tiny_infinity().to(dtype)
    net.save_pretrained(tmp_path)
    loaded = Infinity.from_pretrained(tmp_path)
    assert loaded.config == net.config and not loaded.training and loaded.head.weight.requires_grad
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == dtype
    expected, got = (model.generate(some_texts(), seed=2) for model in (net, loaded))
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.images, expected.images)
    with pytest.raises(ValueError, match=f"from_pretrained: expected a VAR, got an Infinity in {tmp_path}"):
        VAR.from_pretrained(tmp_path)


def test_copies() -> None:
    net = tiny_infinity()
    copied = pickle.loads(pickle.dumps(net))
    assert torch.equal(copied.generate(some_texts()).tokens, net.generate(some_texts()).tokens)
    net.text_encoder = encoder = torch.nn.Linear(2, 2)  # anything large
    clone = net.clone()
    assert clone.tokenizer is net.tokenizer and clone.text_encoder is encoder
    assert clone.head.weight is not net.head.weight and torch.equal(clone.head.weight, net.head.weight)


def test_fresh_weights_learn() -> None:
    """From their own initialisation, in a few steps of plain gradient descent."""
    torch.manual_seed(0)
    net = Infinity(tiny_infinity(gate_init=1.0, condition_dropout=0.0).config, tiny_bits())
    bits = some_bits(net, 4)
    inputs = net.tokenizer.teacher_forcing(bits)
    losses = []
    for _ in range(15):
        losses.append(bitwise_loss(net(some_texts(), inputs), bits))
        gradients = torch.autograd.grad(losses[-1], list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 1.0 * gradient
    assert 0.68 < losses[0] < 0.71 and losses[-1] < 0.6
