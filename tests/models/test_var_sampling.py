"""Sampling of a VAR: what the cache computes is what teacher forcing computes; seeds, guidance, stops, forks."""

from __future__ import annotations

import inspect
import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar.models import VAR, Generation, Infinity
from fastvar.ops import token_log_probs
from tests.helpers.tiny import RECTANGLES, some_subjects, tiny_var, unconditional

LABELS = torch.tensor([0, 3, 4, 1])
TEXTS = ["12", "3", "", "904"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rectangles": {"grids": RECTANGLES},
    "wide": {"grids": ((1, 1), (1, 3), (2, 3)), "embed_dim": 64, "num_heads": 4},
    "shared modulations": {"shared_adaln": True},
    "no L2 norm": {"qk_l2_norm": False},
    "text": {"num_classes": 0, "text_length": 3},
    "block-causal subject": {"subject": "block_causal"},
    "bidirectional subject": {"subject": "bidirectional", "grids": RECTANGLES},
    "subject and text": {"subject": "block_causal", "num_classes": 0, "text_length": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 1.5, "top_k": 10, "top_p": 0.9},
}


def teacher_forced(var: VAR, labels: Any, out: Generation, subject: torch.Tensor | None = None) -> torch.Tensor:
    """The log-probabilities that training gives to the tokens drawn."""
    with torch.no_grad():
        return var(labels, var.tokenizer.teacher_forcing(out.tokens), subject=subject, tokens=out.tokens).log_probs


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[VAR, Any, torch.Tensor | None]:
    """A model, four labels, and two subjects if the model takes some."""
    fields = CASES[request.param]
    var = tiny_var(**fields)
    subject = some_subjects(var, 2) if "subject" in fields else None
    return var, TEXTS if "text_length" in fields else LABELS, subject


@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_are_those_of_training(case: tuple[VAR, Any, Any], settings: str) -> None:
    """Of the conditional model, whatever guidance and truncation made of its distribution."""
    var, labels, subject = case
    out = var.generate(labels, subject=subject, log_probs=True, seed=1, **SETTINGS[settings])
    assert out.tokens.shape == (4, var.schedule.num_tokens) and out.images.shape == (
        4,
        3,
        *var.tokenizer.config.image_size,
    )
    torch.testing.assert_close(out.log_probs, teacher_forced(var, labels, out, subject), rtol=0, atol=1e-4)
    differs = (out.sampled_log_probs - out.log_probs).abs().max() > 0.1
    assert bool(differs) == (settings == "guided")


@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_of_forks(case: tuple[VAR, Any, Any], settings: str) -> None:
    """Three continuations of each image after the first scale, two of each of these before the last one."""
    var, labels, subject = case
    options = {"log_probs": True, "decode": False, **SETTINGS[settings]}
    last = len(var.schedule)
    first = var.generate(labels, subject=subject, stop=1, seed=1, **options)
    second = first.state.fork(3)
    if last > 2:
        second = var.generate(state=second, stop=last - 1, seed=2, **options).state
    out = var.generate(state=second.fork(2), seed=3, **options)
    rows = torch.arange(4).repeat_interleave(6)
    many = [labels[i] for i in rows.tolist()] if isinstance(labels, list) else labels[rows]
    assert torch.equal(out.tokens[:, : first.tokens.shape[1]], first.tokens[rows])
    assert len(out.tokens.unique(dim=0)) > 12, "the continuations are drawn on their own"
    torch.testing.assert_close(out.log_probs, teacher_forced(var, many, out, subject), rtol=0, atol=1e-4)


def test_log_probs_of_the_first_scales() -> None:
    var = tiny_var(subject="block_causal")
    subject = some_subjects(var, 1)
    whole = var.generate(LABELS, subject=subject, log_probs=True)
    for stop in (1, 2):
        out = var.generate(LABELS, subject=subject, stop=stop, log_probs=True)
        end = var.schedule.ends[stop - 1]
        assert torch.equal(out.tokens, whole.tokens[:, :end]) and out.state.scale == stop
        torch.testing.assert_close(out.log_probs, teacher_forced(var, LABELS, out, subject), rtol=0, atol=1e-4)
        torch.testing.assert_close(out.images, var.tokenizer.decode(out.tokens).add(1).mul(0.5), rtol=0, atol=1e-5)


def test_log_probs_at_a_temperature() -> None:
    var = tiny_var()
    out = var.generate(LABELS, temperature=0.7, log_probs=True)
    with torch.no_grad():
        hidden = var.hidden(LABELS, var.tokenizer.teacher_forcing(out.tokens))
    expected = token_log_probs(hidden, var.head.weight, var.head.bias, out.tokens, temperature=0.7).log_probs
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [None, "block_causal"])
def test_guidance(kind: str | None) -> None:
    """The likeliest tokens under (1 + t_k) conditional - t_k unconditional, the latter without label and subject."""
    var = tiny_var(subject=kind or "none")
    subject = some_subjects(var, 2) if kind else None
    weights = [2.0, 0.0, 1.0]
    out = var.generate(LABELS, subject=subject, guidance=weights, top_k=1)
    inputs = var.tokenizer.teacher_forcing(out.tokens)
    with torch.no_grad():
        conditional, dropped = var(LABELS, inputs, subject=subject), unconditional(var)(LABELS, inputs)
    t = torch.tensor(weights)[list(var.schedule.scale_of_token)][:, None]
    assert torch.equal(out.tokens, ((1 + t) * conditional - t * dropped).argmax(-1))
    assert not torch.equal(out.tokens, conditional.argmax(-1))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_options_that_leave_the_likeliest(options: dict[str, Any]) -> None:
    var = tiny_var()
    tokens = var.generate(LABELS, seed=3, decode=False, **options).tokens
    assert torch.equal(tokens, var(LABELS, var.tokenizer.teacher_forcing(tokens)).argmax(-1))


@pytest.mark.parametrize("model", [VAR, Infinity])
def test_options_are_in_the_signature(model: type[VAR | Infinity]) -> None:
    """Typed, by name, and each is explained."""
    own = inspect.signature(model.generate).parameters
    assert {"guidance", "top_p", "graphs", "subject"} <= set(own)
    for name, parameter in [*own.items()][2:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation not in ("Any", parameter.empty)
        assert re.search(rf"^ +[a-z_, ]*\b{name}\b[a-z_, ]*: ", model.generate.__doc__ or "", re.M), name


def test_images_show_themselves() -> None:
    out = tiny_var().generate(LABELS)
    with Image.open(io.BytesIO(out._repr_png_())) as shown:
        assert shown.size == out.picture().size == (2 + 4 * (6 + 2), 2 + 6 + 2)
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    assert torch.equal(pixels[:, 2:8, 2:8], (out.images[0] * 255).round().to(torch.uint8))
    assert out.picture(columns=2).size == (2 + 2 * (6 + 2),) * 2
    blind = tiny_var().generate(LABELS, decode=False)
    assert blind._repr_png_() is None
    with pytest.raises(ValueError, match="Generation: images: expected some, got none"):
        blind.picture()


def test_guidance_of_one_number_grows_over_the_scales() -> None:
    var = tiny_var()
    options = {"top_k": 5, "seed": 3, "decode": False}
    assert torch.equal(
        var.generate(LABELS, guidance=3.0, **options).tokens,
        var.generate(LABELS, guidance=[0.0, 1.5, 3.0], **options).tokens,
    )
    unguided = var.generate(LABELS, **options)
    assert torch.equal(var.generate(LABELS, guidance=[0.0] * 3, **options).tokens, unguided.tokens)
    assert unguided.state is None  # a finished image keeps no cache
    assert not var.generate(LABELS, stop=1, **options).state.guided


def test_a_group_shares_its_subject() -> None:
    var = tiny_var(subject="bidirectional")
    subject = some_subjects(var, 2)
    for guidance in (0.0, 2.0):
        options = {"guidance": guidance, "top_k": 8, "decode": False}
        shared = var.generate(LABELS, subject=subject, **options)
        each = var.generate(LABELS, subject=subject.repeat_interleave(2, 0), **options)
        assert torch.equal(shared.tokens, each.tokens)
        assert not torch.equal(shared.tokens, var.generate(LABELS, subject=subject.flip(0), **options).tokens)


@pytest.mark.parametrize("options", [{}, {"guidance": 1.5, "top_p": 0.9}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    var = tiny_var()
    together = var.generate(LABELS, seed=7, **options)
    for i in range(4):
        alone = var.generate(LABELS[i : i + 1], seed=7, first_sample=i, **options)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.images[0], together.images[i], rtol=0, atol=1e-5)


def test_seeds() -> None:
    var = tiny_var()
    same = torch.full((4,), 2)
    first = var.generate(same, seed=7)
    assert len(first.tokens.unique(dim=0)) == 4
    again = var.generate(same, seed=7)
    assert torch.equal(again.tokens, first.tokens) and torch.equal(again.images, first.images)
    for other in (0, 8, 2**31 - 1):
        assert (var.generate(same, seed=other).tokens != first.tokens).any(1).all()


def test_every_scale_draws_numbers_of_its_own() -> None:
    var = tiny_var(((4, 4), (4, 4)))
    var.head.weight.data.zero_()  # from here on only the numbers decide
    first, second = var.generate(LABELS, seed=7, decode=False).tokens.split(16, 1)
    assert (first == second).float().mean() < 0.2


@pytest.mark.parametrize("fields", [{}, {"subject": "block_causal", "grids": RECTANGLES}], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_stopping_and_continuing(fields: dict[str, Any], guidance: float) -> None:
    """Bit for bit what an uninterrupted run gives."""
    var = tiny_var(**fields)
    subject = some_subjects(var, 2) if fields else None
    options = {"guidance": guidance, "seed": 5, "log_probs": True}
    whole = var.generate(LABELS, subject=subject, **options)
    for stop in range(1, len(var.schedule)):
        part = var.generate(LABELS, subject=subject, stop=stop, decode=False, **options)
        assert part.images is None and part.tokens.shape[1] == var.schedule.ends[stop - 1]
        rest = var.generate(state=part.state, **options)
        for name in ("tokens", "images", "log_probs", "sampled_log_probs"):
            assert torch.equal(getattr(rest, name), getattr(whole, name)), name


def test_forks_share_the_trunk_and_leave_it_alone() -> None:
    var = tiny_var(subject="block_causal")
    options = {"guidance": 2.0, "seed": 5, "decode": False}
    subject = some_subjects(var, 2)
    whole = var.generate(LABELS, subject=subject, **options)
    state = var.generate(LABELS, subject=subject, stop=2, **options).state
    before = (state.tokens.clone(), state.feature_map.clone(), state.cache.keys[:, :, : state.cached].clone())
    forked = state.fork(3)
    for layer in range(2):
        trunk, own = forked.cache.trunk[layer], state.cache
        assert trunk.k.data_ptr() == own.keys[layer].data_ptr() and trunk.v.data_ptr() == own.values[layer].data_ptr()
        assert trunk.k.shape[:2] == (8, 5)
        assert forked.cache.prefix[layer].k.data_ptr() == own.prefix[layer].k.data_ptr()
    assert state.cache.keys.shape[1:3] == (8, 5), "a trunk has no room for more"
    first = var.generate(state=forked, **{**options, "decode": True})
    assert torch.equal(first.tokens[:, :5], before[0].repeat_interleave(3, 0))
    torch.testing.assert_close(first.images, var.tokenizer.decode(first.tokens).clamp(-1, 1) * 0.5 + 0.5)
    assert forked.cache.keys.shape[1:3] == (24, 9), "room for the last scale alone"
    assert forked.cache.nbytes == 2 * forked.cache.keys.numel() * 4
    after = (state.tokens, state.feature_map, state.cache.keys[:, :, : state.cached])
    assert state.scale == 2 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(var.generate(state=state.fork(3), **options).tokens, first.tokens)
    assert torch.equal(var.generate(state=state, **options).tokens, whole.tokens)


def test_a_single_continuation_goes_on_as_the_original_would() -> None:
    var = tiny_var()
    whole = var.generate(LABELS, seed=5)
    state = var.generate(LABELS, stop=1, seed=5).state.fork(1)
    assert torch.equal(var.generate(state=state, seed=5).tokens, whole.tokens)


def test_continuing_without_log_probs_drops_them() -> None:
    """Those of a part of the tokens would not match the tokens."""
    var = tiny_var()
    state = var.generate(LABELS, stop=1, log_probs=True).state
    out = var.generate(state=state, stop=2)
    assert out.log_probs is None and out.sampled_log_probs is None
    with pytest.raises(ValueError, match="log_probs: expected False"):
        var.generate(state=out.state, log_probs=True)


@pytest.mark.parametrize("fields", [{}, {"num_classes": 0, "text_length": 2}], ids=str)
def test_empty_batch(fields: dict[str, Any]) -> None:
    var = tiny_var(**fields)
    labels = [] if fields else LABELS[:0]
    out = var.generate(labels, guidance=1.0, log_probs=True)
    assert out.tokens.shape == out.log_probs.shape == (0, 14) and out.images.shape == (0, 3, 6, 6)


def test_wrong_arguments() -> None:
    var, plain = tiny_var(subject="block_causal"), tiny_var()
    subject = some_subjects(var, 3)
    for message, wrong in [
        ("labels, state: expected exactly one", {}),
        ("subject: expected a number of rows that divides 4, got 3", {"labels": LABELS, "subject": subject}),
        ("subject: expected a number of rows that divides 4, got 0", {"labels": LABELS, "subject": subject[:0]}),
        (r"subject: expected \(R, 14, 8\)", {"labels": LABELS, "subject": subject[:2, 1:]}),
        ("guidance: expected a number or 3 of them, got 2", {"labels": LABELS, "guidance": [1, 2]}),
        ("generate: guidance: expected .*, got nan", {"labels": LABELS, "guidance": math.nan}),
        ("generate: guidance: expected .*, got inf", {"labels": LABELS, "guidance": [0, 1, math.inf]}),
        ("stop: expected 1 to 3, got 0", {"labels": LABELS, "stop": 0}),
        ("stop: expected 1 to 3, got 4", {"labels": LABELS, "stop": 4}),
        ("seed: expected 0 to", {"labels": LABELS, "seed": -1}),
        ("labels: expected indices from 0 to 4", {"labels": LABELS + 2}),
        ("temperature: expected", {"labels": LABELS, "temperature": 0.0}),
        ("top_k: expected", {"labels": LABELS, "top_k": -1}),
        ("top_p: expected", {"labels": LABELS, "top_p": 1.5}),
    ]:
        with pytest.raises(ValueError, match=message):
            var.generate(**wrong)
    with pytest.raises(ValueError, match="subject: this model has no subject prefix"):
        plain.generate(LABELS, subject=subject[:1])

    def state() -> Any:
        return plain.generate(LABELS, stop=2, decode=False).state

    for message, wrong in [
        ("labels, state: expected exactly one", {"labels": LABELS}),
        ("subject: expected None with a state", {"subject": subject[:1]}),
        ("guidance: expected 0, the state was sampled without guidance", {"guidance": 1.0}),
        ("log_probs: expected False", {"log_probs": True}),
        ("stop: expected 3 to 3, got 2", {"stop": 2}),
    ]:
        with pytest.raises(ValueError, match=message):
            plain.generate(state=state(), **wrong)
    kept = plain.generate(LABELS, stop=2, decode=False, log_probs=True).state
    for wrong in ({"top_p": 2.0}, {"top_k": -1}, {"temperature": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError, match="expected"):
            plain.generate(state=kept, **wrong)
        assert kept.log_probs is not None and kept.scale == 2  # a refused call changes nothing
    with pytest.raises(ValueError, match=r"SamplingState\.fork: times: expected at least 1, got 0"):
        state().fork(0)
