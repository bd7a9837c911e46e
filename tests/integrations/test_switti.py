"""A Switti of the public code patched and not: the same numbers, and nothing left after `undo`."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastvar.integrations import apply
from tests.helpers import public_switti
from tests.helpers.agreement import agree
from tests.helpers.public_switti import TEXT, PublicPipeline, PublicSwitti

TEXTS = torch.randn(4, 5, TEXT, generator=torch.Generator().manual_seed(2))
BIAS = torch.where(torch.arange(5) < torch.tensor([[3], [5], [1], [1]]), 0.0, -1e4)


class Pantry(PublicSwitti):
    """A fork's name."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(kind: str) -> PublicPipeline:
    pipeline = PublicPipeline(use_ar=kind == "causal")
    if kind == "fork":
        pipeline.switti = Pantry().eval()
    return pipeline


def trained(pipeline: PublicPipeline) -> dict[str, torch.Tensor]:
    """Tokens, logits and gradients of a step."""
    switti, quantizer = pipeline.switti, pipeline.vae.quantize
    kind = quantizer.embedding.weight.dtype
    features = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(kind)
    tokens = quantizer.f_to_idxBl_or_fhat(features, False)
    parameters = dict([*switti.named_parameters(), *quantizer.named_parameters()])
    logits = switti(quantizer.idxBl_to_switti_input(tokens), TEXTS[:2].to(kind), BIAS[:2])
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return {**found, "logits": logits.detach(), "tokens": torch.cat(tokens, 1)}


def doubled(pipeline: PublicPipeline) -> PublicPipeline:
    pipeline = copy.deepcopy(pipeline)
    pipeline.switti.double()
    pipeline.vae.double()
    return pipeline


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("kind", ["alone", "causal", "fork"])
def test_training_and_sampling_agree(kind: str, precision: str) -> None:
    pipeline = made(kind)

    def both() -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            return trained(pipeline), *pipeline(TEXTS, BIAS, top_k=1)

    exact, logits = trained(doubled(pipeline)), []
    pipeline.switti.head.register_forward_hook(lambda *results: logits.append(results[-1].detach().clone()))
    expected = both()
    with apply(pipeline) as applied:
        found = both()
    agree(found[0], expected[0], exact)
    different = (found[1] != expected[1]).double().mean()
    assert different <= (0 if precision == "float32" else 0.1)
    if precision == "float32":
        half = len(logits) // 2
        torch.testing.assert_close(logits[half:], logits[:half], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=1e-5)
    parts = [each.part for each in applied.replaced]
    assert {"attention", "quantizer", "sampler", "blocks"} == set(parts) and parts.count("attention") == 2
    assert {(each.part, each.why) for each in applied.left} == {
        ("texts", "it keeps keys and values of texts itself"),
        ("blocks", "its RMS norms: the operators have none"),
        ("attention", "its LayerNorm of queries and keys over all heads: the operators normalise a head"),
    }


def test_a_pipeline_in_bfloat16() -> None:
    """As its scripts have it: what the quantizer hands on has the dtype of the layer that takes it."""
    pipeline = made("alone")
    pipeline.switti.bfloat16()
    pipeline.vae.bfloat16()
    arguments = TEXTS.bfloat16(), BIAS.bfloat16()
    expected = pipeline(*arguments, top_k=1)
    with apply(pipeline):
        found = pipeline(*arguments, top_k=1)
    assert found[1].dtype == expected[1].dtype == torch.bfloat16
    assert (found[0] != expected[0]).double().mean() <= 0.3  # a token that differs changes those after it


def test_everything_is_restored() -> None:
    pipeline = made("causal")
    twin, kind = copy.deepcopy(pipeline), type(pipeline)
    modules = [*pipeline.switti.named_modules(), *pipeline.vae.named_modules()]
    before = {name: set(vars(module)) for name, module in modules}
    with apply(pipeline):
        trained(pipeline)
        pipeline(TEXTS, BIAS, top_p=0.9)
        assert type(pipeline) is not kind and isinstance(pipeline, kind)
    assert type(pipeline) is kind and vars(pipeline).keys() == vars(twin).keys()
    assert {name: set(vars(module)) for name, module in modules} == before
    ours, theirs = trained(pipeline), trained(twin)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    images, others = (each(TEXTS, BIAS) for each in (pipeline, twin))
    assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))


def test_what_an_image_needs_once() -> None:
    """Modulations, the norm of texts, and the angles of a scale; no mask is read."""
    pipeline, counted = made("alone"), []
    block = pipeline.switti.blocks[1]
    block.ada_lin.register_forward_hook(lambda *_: counted.append("modulation"))
    block.attention_y_norm.register_forward_hook(lambda *_: counted.append("texts"))
    with (
        apply(pipeline),
        patch("fastvar.integrations.switti.tables", side_effect=lambda *a: counted.append("angles") or _tables(*a)),
    ):
        for image in (1, 2):
            pipeline(TEXTS, BIAS, alone_from=4)
            assert [counted.count(each) for each in ("modulation", "texts", "angles")] == [image, image, 4 * image]
        different = pipeline(TEXTS.flip(1), BIAS, top_k=1)[1]
    torch.testing.assert_close(different, pipeline(TEXTS.flip(1), BIAS, top_k=1)[1], atol=1e-5, rtol=1e-5)


def _tables(*arguments: Any) -> Any:
    turns, tokens, device = arguments
    here = turns[0, :tokens].to(device)
    return here.real.contiguous(), here.imag.contiguous()


def test_training_after_sampling() -> None:
    """The angles that sampling in inference mode has kept are not what gradients need."""
    pipeline = made("alone")
    with apply(pipeline):
        with torch.inference_mode():
            expected = pipeline.switti(torch.zeros(2, 29, 4), TEXTS[:2], BIAS[:2])
        logits = pipeline.switti(torch.zeros(2, 29, 4), TEXTS[:2], BIAS[:2])
        logits.sum().backward()
    torch.testing.assert_close(logits, expected)


def test_the_pipeline_draws_by_the_operator() -> None:
    pipeline, former = made("alone"), public_switti.sample_with_top_k_top_p_
    with apply(pipeline), patch.object(public_switti, "sample_with_top_k_top_p_", side_effect=AssertionError):
        first, again, other = (pipeline(TEXTS, BIAS, seed=s, top_p=0.9)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert public_switti.sample_with_top_k_top_p_ is former


def test_noise_is_the_former_methods() -> None:
    """A call that gives a further argument another value than its default."""
    quantizer, features = made("alone").vae.quantize, torch.randn(2, 4, 4, 4)
    expected = quantizer.f_to_idxBl_or_fhat(features, False, noise_std=2.0)
    plain = quantizer.f_to_idxBl_or_fhat(features, False)
    with apply(quantizer), patch("fastvar.integrations.var.residual_quantize", side_effect=_noted()) as ours:
        found = quantizer.f_to_idxBl_or_fhat(features, False, noise_std=2.0)
        assert not ours.called
        again = quantizer.f_to_idxBl_or_fhat(features, to_fhat=False, noise_std=None)
        assert ours.called
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
    assert torch.equal(torch.cat(again, 1), torch.cat(plain, 1)) and not torch.equal(found[-1], plain[-1])


def _noted() -> Any:
    from fastvar.ops import residual_quantize

    return residual_quantize
