"""Sampling of an Infinity: what the cache computes is what teacher forcing computes; seeds, guidance, stops, forks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastvar.models import Generation, Infinity, SamplingState, TextFeatures
from fastvar.models.text import padded
from fastvar.ops import token_log_probs
from fastvar.schedule import ScaleSchedule
from tests.helpers.tiny import some_texts, tiny_infinity

CASES: dict[str, dict[str, Any]] = {
    "squares": {},
    "rectangles": {"grids": ((1, 1), (1, 2), (3, 2), (4, 3))},
    "patches": {"patchify": True},
    "wide": {"embed_dim": 64, "num_heads": 4, "depth": 2, "bits": 16},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 3.0, "temperature": 0.5, "top_k": 900, "top_p": 0.97},
    "guided hidden states": {"guidance": 3.0, "guidance_layer": 1},
}


@pytest.fixture(params=CASES)
def net(request: pytest.FixtureRequest) -> Infinity:
    return tiny_infinity(**CASES[request.param])


@torch.no_grad()
def teacher_forced(net: Infinity, texts: TextFeatures, out: Generation, temperature: float = 1.0) -> torch.Tensor:
    """The log-probabilities that training gives to the bits drawn."""
    inputs = net.tokenizer.teacher_forcing(out.tokens)
    return net(texts, inputs, bits=out.tokens, temperature=temperature).log_probs


@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_are_those_of_training(net: Infinity, settings: str) -> None:
    """Of the conditional model, whatever guidance and truncation made of its distribution; where guidance mixes hidden
    states they are those of the mixture, which training does not know."""
    options = SETTINGS[settings]
    out = net.generate(some_texts(), log_probs=True, seed=1, **options)
    length, bits = net.schedule.num_tokens, net.config.bits
    assert out.tokens.shape == (4, length, bits) and out.tokens.dtype == torch.bool
    assert out.images.shape == (4, 3, *net.tokenizer.config.image_size) and out.state is None
    assert out.images.min() >= 0 and out.images.max() <= 1 and 0.2 < out.tokens.float().mean() < 0.8
    assert out.log_probs.shape == out.sampled_log_probs.shape == (4, length)
    expected = teacher_forced(net, some_texts(), out, options.get("temperature", 1.0))
    close = torch.allclose(out.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert close == ("guidance_layer" not in options)
    assert torch.equal(out.sampled_log_probs, out.log_probs) == (settings != "guided")
    torch.testing.assert_close(out.images, net.tokenizer.decode(out.tokens) * 0.5 + 0.5, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_on_logits() -> None:
    """g conditional + (1 - g) unconditional, by scale; the unconditional text is the learned one of the same length, or
    another that is given."""
    net, texts = tiny_infinity(), some_texts()
    other = some_texts((2, 6, 1, 1), seed=9)
    for negative in (None, other):
        guidance = [2.0, 1.0, 3.5]
        out = net.generate(texts, guidance=guidance, negative=negative, top_k=1)
        inputs = net.tokenizer.teacher_forcing(out.tokens)
        against = net.no_text(texts.lengths) if negative is None else negative
        own, opposite = net(texts, inputs), net(against, inputs)
        weight = torch.tensor(guidance)[torch.tensor(net.schedule.scale_of_token), None]
        mixed = weight * own + (1 - weight) * opposite
        assert torch.equal(out.tokens, mixed > 0)
        assert not torch.equal(out.tokens, own > 0)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2])
def test_guidance_on_hidden_states(layer: int) -> None:
    """After block depth - n both halves become the mixture; here with both halves computed to the end, as upstream."""
    net, texts = tiny_infinity(depth=4), some_texts()
    guidance = [2.0, 1.0, 3.0]
    out = net.generate(texts, guidance=guidance, guidance_layer=layer, top_k=1)
    whole = TextFeatures.joined([texts, net.no_text(texts.lengths)])
    weight = torch.tensor(guidance)[torch.tensor(net.schedule.scale_of_token), None]

    def mix(module: Any, inputs: Any, x: torch.Tensor) -> torch.Tensor:
        own, opposite = x.chunk(2)
        mixed = weight * own + (1 - weight) * opposite
        return torch.cat([mixed, torch.where(weight == 1, opposite, mixed)])

    hook = net.blocks[4 - layer].register_forward_hook(mix)
    inputs = net.tokenizer.teacher_forcing(out.tokens)
    logits = net(whole, torch.cat([inputs, inputs]))[:4]
    hook.remove()
    assert torch.equal(out.tokens, logits > 0)
    assert not torch.equal(out.tokens, net.generate(texts, guidance=guidance, top_k=1).tokens)


def test_no_guidance_computes_no_unconditional_rows() -> None:
    net, texts = tiny_infinity(), some_texts()
    out = net.generate(texts, seed=3, stop=2)
    assert out.state.cache.keys.shape[1] == 4
    assert net.generate(texts, seed=3, stop=2, guidance=[1.0, 1.0, 2.0]).state.cache.keys.shape[1] == 8
    assert torch.equal(net.generate(texts, guidance=1.0).tokens, net.generate(texts).tokens)


@torch.no_grad()
def test_temperature_by_scale() -> None:
    """It divides the logits: log-probabilities are those at the temperature of their scale, draws are sharper."""
    net, texts, temperatures = tiny_infinity(), some_texts(), [0.5, 2.0, 0.1]
    out = net.generate(texts, temperature=temperatures, log_probs=True)
    by_token = torch.tensor(temperatures)[torch.tensor(net.schedule.scale_of_token), None]
    logits = net(texts, net.tokenizer.teacher_forcing(out.tokens)) / by_token
    expected = token_log_probs(logits, None, None, out.tokens).log_probs
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-4, atol=1e-4)
    cold = net.generate(texts, temperature=1e-6).tokens
    assert torch.equal(cold, net.generate(texts, top_k=1).tokens)
    assert torch.equal(cold, net.generate(texts, top_p=0.5).tokens)
    assert not torch.equal(cold, net.generate(texts).tokens)


def test_a_sample_does_not_depend_on_its_batch(net: Infinity) -> None:
    texts = some_texts()
    together = net.generate(texts, seed=5, guidance=2.0).tokens
    for i in range(4):
        alone = net.generate(texts.some(slice(i, i + 1)), seed=5, first_sample=i, guidance=2.0).tokens
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(net.generate(texts, seed=6, guidance=2.0).tokens, together)
    same = net.generate(TextFeatures.joined([texts.some(slice(0, 1))] * 3), seed=5).tokens
    assert not torch.equal(same[0], same[1])


def test_every_scale_draws_numbers_of_its_own() -> None:
    net = tiny_infinity(((1, 1), (1, 1), (1, 1)))
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.zeros_(net.head.bias)
    bits = net.generate(some_texts()).tokens
    assert 0.3 < bits.float().mean() < 0.7
    assert len(bits.flatten(0, 1).unique(dim=0)) == 12


@pytest.mark.parametrize("settings", SETTINGS)
def test_stopping_and_going_on(net: Infinity, settings: str) -> None:
    options = {**SETTINGS[settings], "seed": 2, "log_probs": True}
    whole = net.generate(some_texts(), **options)
    part = net.generate(some_texts(), stop=2, **options)
    assert part.tokens.shape[1] == net.schedule.ends[1] and part.state.scale == 2
    rest = net.generate(state=part.state, **options)
    assert torch.equal(rest.tokens, whole.tokens) and rest.state is None
    torch.testing.assert_close(rest.log_probs, whole.log_probs)
    torch.testing.assert_close(rest.images, whole.images)
    with pytest.raises(ValueError, match="state: expected one that is not finished"):
        net.generate(state=part.state, **options)


@pytest.mark.parametrize("settings", SETTINGS)
def test_forks_go_on_from_what_they_share(settings: str) -> None:
    """Forks of forks too: each continues its own beginning, as if all had been computed for it alone."""
    net, texts, options = tiny_infinity(), some_texts(), {**SETTINGS[settings], "log_probs": True}
    first = net.generate(texts, stop=1, seed=1, **options)
    second = net.generate(state=first.state.fork(2), stop=2, seed=2, **options)
    third = net.generate(state=second.state.fork(3), seed=3, **options)
    assert third.tokens.shape[0] == 24
    assert torch.equal(third.tokens[:, :1], first.tokens.repeat_interleave(6, 0))
    assert torch.equal(third.tokens[:, :5], second.tokens.repeat_interleave(3, 0))
    assert len(third.tokens[:6, 5:].flatten(1).unique(dim=0)) == 6
    again = TextFeatures.joined([texts.some(slice(i // 6, i // 6 + 1)) for i in range(24)])
    if "guidance_layer" not in options:
        expected = teacher_forced(net, again, third, options.get("temperature", 1.0))
        torch.testing.assert_close(third.log_probs, expected, rtol=1e-4, atol=1e-4)
    greedy = net.generate(state=net.generate(texts, stop=2, top_k=1).state.fork(2), top_k=1)
    assert torch.equal(greedy.tokens, net.generate(texts, top_k=1).tokens.repeat_interleave(2, 0))


def test_another_schedule() -> None:
    net, schedule = tiny_infinity(), ScaleSchedule(((1, 1), (1, 2), (2, 5)))
    other = tiny_infinity(schedule.grids)
    got, expected = net.generate(some_texts(), schedule=schedule), other.generate(some_texts())
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.images, expected.images)
    assert got.images.shape == (4, 3, 4, 10)


def test_no_images_and_no_samples() -> None:
    net = tiny_infinity()
    assert net.generate(some_texts(), decode=False).images is None
    empty = net.generate(TextFeatures(torch.empty(0, 12), ()), guidance=2.0, log_probs=True)
    assert empty.tokens.shape == (0, 14, 8) and empty.images.shape == (0, 3, 6, 6) and empty.log_probs.shape == (0, 14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    """The cache is of the compute dtype, and what is sampled is scored alike; upstream's sampler and trainer differ."""
    net = tiny_infinity()
    if not autocast:
        net.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        part = net.generate(some_texts(), guidance=2.0, stop=2, log_probs=True)
        assert part.state.cache.keys.dtype == dtype
        out = net.generate(state=part.state, guidance=2.0, log_probs=True)
        expected = teacher_forced(net, some_texts(), out)
    assert out.log_probs.dtype == expected.dtype == out.images.dtype == torch.float32
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=0.05)
    exact = teacher_forced(tiny_infinity(), some_texts(), out)
    torch.testing.assert_close(expected, exact, rtol=0, atol=0.15)
    assert not torch.equal(expected, exact)


@torch.no_grad()
def test_what_blocks_are_told_under_autocast() -> None:
    """Biases and texts once in its dtype, not cast by every scale; the rest is the same to the bit."""
    net = tiny_infinity()
    texts = padded(some_texts(), 8)
    condition, plain = net.read(texts.packed, texts.where)
    with torch.autocast("cpu", torch.bfloat16):
        same, told = net.read(texts.packed, texts.where)
    assert all(bias.dtype == torch.bfloat16 for bias in told.biases)
    assert all(text.k.dtype == text.v.dtype == torch.bfloat16 for text in told.texts)
    for found, expected in zip([same, told.head, *told.blocks], [condition, plain.head, *plain.blocks], strict=True):
        assert torch.equal(found, expected)


def state_of(net: Infinity, **options: Any) -> SamplingState:
    return net.generate(some_texts(), stop=1, **options).state


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": -1},
        {"temperature": 0.0},
        {"guidance": -1e12},
        {"guidance_layer": 2},
        {"stop": 1},
    ],
    ids=str,
)
def test_a_refused_call_leaves_the_state(wrong: dict[str, Any]) -> None:
    net = tiny_infinity(depth=4)
    options: dict[str, Any] = {"guidance": 2.0, "guidance_layer": 1, "log_probs": True}
    state = state_of(net, **options)
    before, held = dict(vars(state)), dict(vars(state.cache))
    with pytest.raises(ValueError, match=f"generate: {next(iter(wrong))}: expected"):
        net.generate(state=state, **{"guidance": 2.0, **wrong})
    assert all(vars(state)[name] is value for name, value in before.items())
    assert all(vars(state.cache)[name] is value for name, value in held.items())


def test_numbers_of_any_kind() -> None:
    """One for all scales, or one each; a state has its guidance's layer and its schedule."""
    net = tiny_infinity()
    settings = {"guidance_layer": 1, "schedule": net.schedule}
    numbers = [2.0, 1.0, 3.5]
    expected = net.generate(some_texts(), guidance=numbers, **settings).tokens
    for given in (tuple(numbers), np.array(numbers), torch.tensor(numbers), np.array(numbers, "float32")):
        state = state_of(net, guidance=given, **settings)
        for options in ({}, settings):
            assert torch.equal(net.generate(state=state.fork(1), guidance=given, **options).tokens, expected)
    same = [net.generate(some_texts(), guidance=g).tokens for g in (2, 2.0, np.float32(2), torch.tensor(2.0), [2] * 3)]
    assert all(torch.equal(tokens, same[0]) for tokens in same)


def test_wrong_arguments() -> None:
    net = tiny_infinity()
    for options, expected in [
        ({}, "texts, state: expected exactly one of them"),
        ({"texts": some_texts(), "guidance": [1.0, 2.0]}, "guidance: expected a number or 3 of them, got 2"),
        ({"texts": some_texts(), "guidance": torch.ones(1, 3)}, r"guidance: expected a number or 3 of them, got \[\["),
        ({"texts": some_texts(), "guidance": "2.0"}, "guidance: expected a number or 3 of them, got '2.0'"),
        ({"texts": some_texts(), "guidance": None}, "guidance: expected a number or 3 of them, got None"),
        ({"texts": some_texts(), "guidance": -1e12}, "guidance: expected .* to 1e"),
        ({"texts": some_texts(), "temperature": 0.0}, "temperature: expected 1e-12 to 1e"),
        ({"texts": some_texts(), "temperature": [1.0, -1.0, 1.0]}, "temperature: expected 1e-12 to 1e.*got -1"),
        ({"texts": some_texts(), "guidance_layer": 3}, "guidance_layer: expected 0 to 2, one less than blocks, got 3"),
        ({"texts": some_texts(), "top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"texts": some_texts(), "top_p": 1.5}, "top_p: expected a probability from 0 to 1, got 1.5"),
        ({"texts": some_texts(), "stop": 4}, "stop: expected 1 to 3, got 4"),
        ({"texts": some_texts(), "negative": some_texts((1,)), "guidance": 2.0}, "negative: expected 4 texts, got 1"),
        ({"state": state_of(net), "guidance": 2.0}, "guidance: expected 1, the state was sampled without guidance"),
        ({"state": state_of(net), "log_probs": True}, "log_probs: expected False, the state was sampled without"),
        ({"state": state_of(net), "guidance_layer": 1}, "guidance_layer: expected None or the state's own, 0, got 1"),
        (
            {"state": state_of(net), "schedule": ScaleSchedule((1, 2))},
            "schedule: expected None or the state's own, .*got",
        ),
        ({"state": state_of(net), "negative": ["a"]}, "negative: expected None with a state, .*, got some"),
    ]:
        with pytest.raises(ValueError, match=f"generate: {expected}"):
            net.generate(**options)
    with pytest.raises(ValueError, match=r"SamplingState\.fork: times: expected at least 1, got 0"):
        state_of(net).fork(0)
    net._tokenizer = ()
    with pytest.raises(RuntimeError, match="Infinity: tokenizer: none attached"):
        net.generate(some_texts())
