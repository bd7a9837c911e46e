"""One protocol: who draws, rolls out and evaluates treats a VAR and an Infinity alike."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
import torch

from fastvar.evaluation import draw
from fastvar.models import VAR, Infinity, Model, NextScaleModel, SamplingOptions, TextFeatures
from fastvar.rl import Prompts, roll_out
from tests.helpers.tiny import some_texts, tiny_infinity, tiny_var

TEXTS = ["12", "3", "", "904"]


@pytest.fixture(params=[VAR, Infinity])
def model(request: pytest.FixtureRequest) -> Model:
    """Conditioned on short texts."""
    if request.param is VAR:
        return tiny_var(num_classes=0, text_length=3, subject="block_causal")
    net = tiny_infinity(subject="block_causal")
    net.text_encoder = lambda texts: TextFeatures.joined(
        [some_texts(()), *(some_texts((len(text) + 1,), seed=sum(map(ord, text))) for text in texts)]
    )
    return net


@torch.no_grad()
def teacher_forced(model: Model, tokens: torch.Tensor, subject: torch.Tensor | None = None) -> torch.Tensor:
    prompts = [TEXTS[i * 4 // len(tokens)] for i in range(len(tokens))]
    hidden = model.hidden(prompts, model.tokenizer.teacher_forcing(tokens), subject=subject)
    return model.logits(hidden)


def test_nothing_is_missing(model: Model) -> None:
    for name, function in vars(NextScaleModel).items():
        if inspect.isfunction(function):
            body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body  # type: ignore[attr-defined]
            if isinstance(body[-1], ast.Raise):
                assert getattr(type(model), name) is not function, name
    assert callable(type(model).generate)


def test_one_number_a_scale(model: Model) -> None:
    """Of temperature, top-k and top-p: where one leaves the likeliest, the tokens are those."""
    ends = model.schedule.ends
    for options in (
        {"temperature": [1e-6, 1.0, 1e-6]},
        {"top_k": (1, 0, 1)},
        {"top_p": torch.tensor([1e-6, 1.0, 1e-6])},
    ):
        tokens = model.generate(TEXTS, seed=3, decode=False, **options).tokens
        logits = teacher_forced(model, tokens)
        likeliest = logits > 0 if tokens.dtype == torch.bool else logits.argmax(-1)
        same = (tokens == likeliest).flatten(2).all(2) if tokens.ndim == 3 else tokens == likeliest
        assert same[:, : ends[0]].all() and same[:, ends[1] :].all() and not same[:, ends[0] : ends[1]].all()
    for name, wrong, message in (
        ("temperature", [1.0, 0.0, 1.0], r"expected 1e-12 to 1e\+12 \(for the likeliest one top_k=1\), got 0"),
        ("top_k", [1, 2], "expected an integer or 3 of them, got 2"),
        ("top_k", 1.5, "expected an integer or 3 of them, got 1.5"),
        ("top_p", [1.0, 1.0, 1.5], "expected a probability from 0 to 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=f"^generate: {name}: {message}"):
            model.generate(TEXTS, **{name: wrong})


def test_evaluations(model: Model) -> None:
    options = SamplingOptions(guidance=2.5, top_p=0.9, batch_size=3)
    images = draw(model, TEXTS, options, seed=4)
    torch.testing.assert_close(images, model.generate(TEXTS, guidance=2.5, top_p=0.9, seed=4).images)
    with pytest.raises(ValueError, match=r"^draw: prompts: expected at least one, got none"):
        draw(model, [], options)


def test_options_of_no_guidance(model: Model) -> None:
    """By default: what is drawn follows the prompts alone, of which each token passes the network once."""
    first, second = (draw(model, texts, SamplingOptions(), seed=4) for texts in (["12", "3"], ["904", "12"]))
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(first, model.generate(["12", "3"], seed=4).images)
    drawn = roll_out(model, Prompts(["12", "3"]), group_size=2, seed=4, options=SamplingOptions())
    torch.testing.assert_close(drawn.images, model.generate(["12", "12", "3", "3"], seed=4).images)
    assert drawn.passed_tokens == 4 * 14


@pytest.mark.parametrize("segment", ["whole", "coarse", "fine"])
def test_rollouts(model: Model, segment: Any) -> None:
    """With the subjects of references; log-probabilities are those of training."""
    references = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(guidance=model.no_guidance, batch_size=4)
    drawn = roll_out(
        model,
        Prompts(TEXTS, references=references),
        segment=segment,
        group_size=2,
        middle=2,
        continuations=2,
        seed=1,
        options=options,
    )
    tokens = drawn.tokens
    assert len(tokens) == 8 and len(drawn.images) == (16 if segment == "coarse" else 8)
    logits = teacher_forced(model, tokens, drawn.subject)
    if tokens.dtype == torch.bool:
        expected = -torch.nn.functional.softplus(torch.where(tokens, -logits, logits)).sum(-1)
    else:
        expected = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(drawn.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert drawn.passed_tokens == {"whole": 8 * 14, "coarse": 8 * 5 + 16 * 9, "fine": 4 * 5 + 8 * 9}[segment]
