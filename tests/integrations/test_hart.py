"""A HART of the public code patched and not: the same numbers, and nothing left after `undo`."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fastvar.integrations import apply
from tests.helpers import public_hart
from tests.helpers.agreement import agree
from tests.helpers.public_hart import LENGTH, PATCHES, TEXTS, WIDTH, PublicHART

CONTEXT = torch.randn(2, TEXTS, 5, generator=torch.Generator().manual_seed(2))
POSITIONS, VALID = torch.tensor([[0, 1, 1], [0, 1, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
NORM = "its norm is RMSNorm(), expected a LayerNorm without weights"
NORMS = "its RMS norms: the operators have none"
POSITIONED = "its positions: the halves of a pair turn by angles of their own"


class Bakery(PublicHART):
    """A fork's name."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(kind: str) -> PublicHART:
    return {
        "plain": PublicHART,
        "cosine": lambda: PublicHART(cosine=True),
        "fork": lambda: Bakery(table=True),
    }[kind]().eval()


def trained(model: PublicHART, left: int = 9) -> dict[str, torch.Tensor]:
    """Tokens, what is left of the features, logits and gradients of a step that keeps some of the last scale."""
    (quantizer,) = model.vae_quant_proxy
    kind = quantizer.embedding.weight.dtype
    features = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(kind)
    *tokens, rest = quantizer.f_to_idxBl_and_frest(features)
    kept = torch.ones(2, LENGTH, dtype=torch.bool)
    kept[0, LENGTH - 16 + left :] = kept[1, LENGTH - 16 : LENGTH - left] = False
    parameters = dict([*model.named_parameters(), *quantizer.named_parameters()])
    inputs = quantizer.idxBl_to_var_input([*tokens, rest], patch_nums=model.patch_nums)
    logits = model(CONTEXT.to(kind), inputs, POSITIONS, VALID, kept)
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return {**found, "logits": logits.detach(), "rest": rest.detach(), "tokens": torch.cat(tokens, 1)}


def sampled(model: PublicHART, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.autoregressive_infer_cfg(CONTEXT, POSITIONS, VALID, **options)


def doubled(model: PublicHART) -> PublicHART:
    model = copy.deepcopy(model).double()
    model.vae_quant_proxy[0].double()
    return model


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("kind", ["plain", "cosine", "fork"])
def test_training_and_sampling_agree(kind: str, precision: str) -> None:
    model = made(kind)

    def both() -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            return trained(model), *sampled(model, top_k=1)

    exact, logits = trained(doubled(model)), []
    model.head.register_forward_hook(lambda *results: logits.append(results[-1].detach().clone()))
    expected = both()
    with apply(model) as applied:
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
    left = {(each.place, each.why.partition(", and by")[0]) for each in applied.left if "1" not in each.place}
    assert left == {("blocks.0", NORMS), ("head_nm", NORM), ("blocks.0.attn", POSITIONED)}


@pytest.mark.parametrize("left", [2, 16])
def test_any_number_of_the_last_scale(left: int) -> None:
    """Fewer than the scale before has, and all; the mask is not read again."""
    model = made("plain")
    exact, expected = trained(doubled(model), left), trained(model, left)
    with apply(model, "attention"):
        agree(trained(model, left), expected, exact)
        with patch("torch.nn.functional.scaled_dot_product_attention", side_effect=_unmasked()):
            trained(model, left)


def _unmasked() -> Any:
    attend = torch.nn.functional.scaled_dot_product_attention

    def checked(*tensors: torch.Tensor, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        assert attn_mask is None
        return attend(*tensors, **options)

    return checked


def test_another_mask_is_left_to_the_model() -> None:
    model, x = made("plain"), torch.randn(2, LENGTH, WIDTH)
    attention, mask = model.blocks[0].attn, torch.zeros(1, 1, LENGTH, LENGTH)
    options = {"context_position_ids": POSITIONS}
    expected = attention(x, mask, **options)
    with apply(model, "attention"):
        assert torch.equal(attention(x, mask, **options), expected)


def test_everything_is_restored() -> None:
    model = made("plain")
    twin = copy.deepcopy(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with apply(model):
        trained(model)
        sampled(model, top_p=0.9)
        assert model.state_dict().keys() == twin.state_dict().keys()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    ours, theirs = trained(model), trained(twin)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    images, others = sampled(model), sampled(twin)
    assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))


def test_what_an_image_needs_once() -> None:
    """Modulations once, angles once a step of the last scale or a scale; keys in one memory."""
    model, counted, places = made("plain"), [], set()
    model.blocks[0].ada_lin.register_forward_hook(lambda *_: counted.append("modulation"))
    model.blocks[0].attn.rotary_emb.register_forward_hook(lambda *_: counted.append("angles"))
    model.blocks[1].attn.rotary_emb.register_forward_hook(lambda *_: counted.append("angles"))
    with apply(model):
        model.blocks[0].attn.register_forward_hook(lambda module, *_: places.add(module.cached_k.data_ptr()))
        sampled(model)
        assert len(places) == 1 and sorted(counted) == ["angles"] * 4 + ["modulation"]
        sampled(model)
        assert sorted(counted) == ["angles"] * 8 + ["modulation"] * 2


def test_the_sampler_draws_by_the_operator() -> None:
    model = made("plain")
    with apply(model), patch.object(public_hart, "sample_with_top_k_top_p_", side_effect=AssertionError):
        first, again, other = (sampled(model, g_seed=seed, top_p=0.9)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_other_grids_are_the_former_methods() -> None:
    (quantizer,) = made("plain").vae_quant_proxy
    tokens = quantizer.f_to_idxBl_or_fhat(torch.randn(2, 4, 4, 4), False)
    expected = quantizer.idxBl_to_var_input(tokens)
    with apply(quantizer), patch("fastvar.integrations.hart.inputs_of", side_effect=AssertionError):
        torch.testing.assert_close(quantizer.idxBl_to_var_input(tokens, patch_nums=(1, 2, 3, 5)), expected)
        with pytest.raises(AssertionError):
            quantizer.idxBl_to_var_input(tokens, patch_nums=PATCHES)


def test_what_it_cannot_do_is_left() -> None:
    model = made("plain")
    first, second = model.blocks
    first.cross_attn = torch.nn.Linear(2, 2)
    second.attn.context_token = 0
    with apply(model, ("attention", "blocks")) as applied:
        assert {(each.place, each.why.partition(", and by")[0]) for each in applied.left} == {
            ("blocks.0", "it has parts that the public one has not: cross_attn"),
            ("blocks.1", NORMS),
            ("blocks.0.attn", POSITIONED),
            ("blocks.1.attn", "it has no texts before the image"),
            ("head_nm", NORM),
        }
