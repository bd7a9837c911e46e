"""A VAR of the public code patched and not: the same numbers, and nothing left after `undo`."""

from __future__ import annotations

import copy
from functools import partial, wraps
from io import BytesIO
from pickle import PicklingError
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvar.integrations import PARTS, apply, undo
from fastvar.ops import sample_tokens
from tests.helpers import public_var
from tests.helpers.agreement import agree, moved
from tests.helpers.public_var import Kitchen, PublicVAR, sample_with_top_k_top_p_

LABELS = torch.tensor([1, 4])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(kind: str) -> Any:
    return {
        "cosine": PublicVAR,
        "znorm": lambda: PublicVAR(znorm=True),
        "shared": lambda: PublicVAR(shared=True),
        "fork": Kitchen,
    }[kind]().eval()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients of a step, of which the quantizer's come from the inputs."""
    (quantizer,) = model.vae_quant_proxy
    features = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    tokens = quantizer.f_to_idxBl_or_fhat(features.to(quantizer.embedding.weight.dtype), False)
    parameters = dict([*model.named_parameters(), *quantizer.named_parameters()])
    logits = model(LABELS, quantizer.idxBl_to_var_input(tokens))
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return {**found, "logits": logits.detach(), "tokens": torch.cat(tokens, 1)}


def doubled(model: Any) -> Any:
    model = copy.deepcopy(model).double()
    model.vae_quant_proxy[0].double()
    return model


def nearby(model: Any, parts: str = "all") -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Of three models a rounding away, patched and not."""
    pairs = []
    for other in (moved(model) for _ in range(3)):
        plain = trained(other)
        with apply(other, parts):
            pairs.append((trained(other), plain))
    return pairs


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("kind", ["cosine", "znorm", "shared", "fork"])
def test_training_and_sampling_agree(kind: str, precision: str) -> None:
    """The likeliest tokens exactly in float32, logits and gradients to rounding."""
    model = made(kind)
    if precision == "bfloat16":
        for block in model.blocks:
            block.bfloat16()

    def both() -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            return trained(model), *model.autoregressive_infer_cfg(LABELS, top_k=1)

    exact, expected = trained(doubled(model)), both()
    others = nearby(model) if precision == "float32" else []
    with apply(model) as applied:
        found = both()
    agree(found[0], expected[0], exact, *others)
    different = (found[1] != expected[1]).double().mean()
    if precision == "float32":
        assert different == 0
        torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=1e-5)
    assert different <= 0.1  # where two tokens are about as likely, roundings in 16 bits decide
    parts = [each.part for each in applied.replaced]
    assert {"attention", "quantizer", "sampler", "blocks"} == set(parts) and parts.count("attention") == 2
    assert [each.kind for each in applied.left] == (["KitchenNorm"] if kind == "fork" else [])


def test_everything_is_restored() -> None:
    """A step while patched, then undone: state, methods and outputs are those of a model that was never patched."""
    model = made("cosine").train()
    before = {name: dict(vars(module)) for name, module in everything(model)}
    twin = copy.deepcopy(model)
    applied = apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trained(model)
    optimizer.step()
    model.autoregressive_infer_cfg(LABELS, top_k=3)
    assert not vars(public_var)["sample_with_top_k_top_p_"].__closure__  # the module's own again
    assert "_fastvar" in vars(model.blocks[0]) and model.state_dict().keys() == twin.state_dict().keys()
    applied.undo()
    applied.undo()  # twice is once
    for name, module in everything(model):
        assert vars(module).keys() == before[name].keys(), name
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    results = []
    for each in (model, twin):
        torch.manual_seed(3)
        results.append((trained(each), each.autoregressive_infer_cfg(LABELS, top_k=5)))
    (left, images), (right, others) = results
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))


def everything(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_modules(), ("quantizer", model.vae_quant_proxy[0])]


def test_what_it_says() -> None:
    model = made("fork")
    with apply(model) as applied:
        report = str(applied)
    assert "replaced: attention: 2 x KitchenAttention (blocks.0.attn, ...): attention without a dense mask" in report
    left = (
        "left: blocks: 1 x KitchenNorm (head_nm): its forward takes (x_BLC, cond_BD, tone), expected (x_BLC, cond_BD)"
    )
    assert left in report and "note: equal seeds draw other images than before" in report
    model.blocks[1].attn.attn_drop = 0.1
    with apply(model, "attention") as applied:
        assert [(each.place, each.why) for each in applied.left] == [
            ("blocks.1.attn", "it drops attention weights, which the operators do not")
        ]
        assert [each.place for each in applied.replaced] == ["blocks.0.attn"]


@pytest.mark.parametrize("part", ["attention", "blocks", "quantizer", "sampler"])
def test_each_part_alone(part: str) -> None:
    model = made("cosine")
    exact = trained(doubled(model))
    expected, drawn = trained(model), model.autoregressive_infer_cfg(LABELS, top_k=1)
    others = nearby(model, part)
    with apply(model, part) as applied:
        agree(trained(model), expected, exact, *others)
        assert torch.equal(model.autoregressive_infer_cfg(LABELS, top_k=1)[0], drawn[0])
    assert {each.part for each in applied.replaced} == {part}


def test_mistakes() -> None:
    model = made("cosine")
    with pytest.raises(ValueError, match=r"parts: expected some of attention, .*, got speed"):
        apply(model, ("attention", "speed"))
    with pytest.raises(ValueError, match="expected a VAR, an Infinity, a HART or a Switti, got Linear: nothing in it"):
        apply(torch.nn.Linear(2, 2))
    for part in PARTS:
        if part not in ("texts", "loss"):  # a VAR has none
            with apply(model, part), pytest.raises(ValueError, match="model: is patched already; undo that first"):
                apply(model)


def test_other_masks_are_left_to_the_model() -> None:
    """A mask that is not the schedule's is the former method's affair; one of scales apart is understood."""
    model, x = made("cosine"), torch.randn(2, 30, 16)
    attention = model.blocks[0].attn
    level = model.attn_bias_for_masking.isfinite().sum(-1)[0, 0]
    for seen, known in ((level[:, None] == level, True), (level[:, None] <= level, False)):
        mask = torch.where(seen, 0.0, -torch.inf)[None, None]
        expected = attention(x, attn_bias=mask)
        with apply(model, "attention"), patch("fastvar.integrations.var.attend_to_scales", wraps=attend()) as ours:
            torch.testing.assert_close(attention(x, attn_bias=mask), expected, atol=1e-5, rtol=1e-5)
            assert ours.called == known


def attend() -> Any:
    from fastvar.integrations import var

    return var.attend_to_scales


def test_it_reads_no_mask_and_keeps_one_cache() -> None:
    """In training SDPA gets no mask; in sampling modulations are made once and keys are written into one memory."""
    model = made("cosine")
    places, counted = set(), []
    model.blocks[0].ada_lin.register_forward_hook(lambda *_: counted.append(1))
    with apply(model):
        model.blocks[0].attn.register_forward_hook(lambda module, *_: places.add(module.cached_k.data_ptr()))
        model.autoregressive_infer_cfg(LABELS)
        assert len(places) == 1 and len(counted) == 1
        assert model.blocks[0].attn.cached_k is None  # and none is kept
        run = vars(model.blocks[0].attn)["_fastvar"].run
        assert not run.caches and not run._kept


def test_the_sampler_draws_by_the_operator() -> None:
    """Of this model alone: the function of its module is the former one while it runs."""
    model, former, seen = made("cosine"), public_var.sample_with_top_k_top_p_, []

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append((public_var.sample_with_top_k_top_p_, options["top_k"], options["top_p"]))
        return sample_tokens(*arguments, **options)

    with apply(model, "sampler"), patch("fastvar.integrations.samplers.sample_tokens", noted):
        model.autoregressive_infer_cfg(LABELS, top_k=3, top_p=0.9)
    assert set(seen) == {(former, 3, 0.9)} and len(seen) == 4


def test_what_others_have_changed_is_left() -> None:
    """A method that somebody has replaced, and attention with parts that the public one has not."""
    model = made("cosine")
    first, second = (block.attn for block in model.blocks[:2])
    first.forward = first.forward
    second.k_norm = torch.nn.LayerNorm(8)
    with apply(model) as applied:
        left = {each.why for each in applied.left if each.part == "attention"}
        assert left == {
            "its forward was replaced by somebody else",
            "it has parts that the public one has not: k_norm",
        }
    applied = apply(model)
    model.head_nm.forward = partial(model.head_nm.forward)
    with pytest.raises(RuntimeError, match="undo: expected forward as it was set, got another"):
        applied.undo()


def test_smoothing_reads_truncated_logits() -> None:
    model = made("cosine")
    expected = model.autoregressive_infer_cfg(LABELS, top_k=2, more_smooth=True)
    with apply(model, "sampler"):
        found = model.autoregressive_infer_cfg(LABELS, top_k=2, more_smooth=True)
    assert torch.equal(found[1], expected[1])


def test_draws_follow_the_generator() -> None:
    model = made("cosine")
    with apply(model):
        first, again, other = (model.autoregressive_infer_cfg(LABELS, g_seed=s, top_p=0.9)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_changed_tokens_have_their_own_inputs() -> None:
    """The inputs that came with tokens are not given for tokens that were changed since, nor a second time."""
    (quantizer,) = made("cosine").vae_quant_proxy
    quantizer.requires_grad_(False)
    features = torch.randn(2, 4, 4, 4)
    with apply(quantizer):
        tokens = quantizer.f_to_idxBl_or_fhat(features, False)
        with patch("fastvar.integrations.var.accumulate_scale", side_effect=AssertionError):
            expected = quantizer.idxBl_to_var_input(tokens)
        torch.testing.assert_close(quantizer.idxBl_to_var_input(tokens), expected)
        tokens = quantizer.f_to_idxBl_or_fhat(features, False)
        tokens[1][0, 0] = (tokens[1][0, 0] + 1) % 32
        changed = quantizer.idxBl_to_var_input(tokens)
    torch.testing.assert_close(changed, quantizer.idxBl_to_var_input(tokens))
    assert not torch.equal(changed, expected)


def test_a_copy_has_methods_of_its_own() -> None:
    """As an average of weights is made; hooks and checkpointing work."""
    model = made("cosine")
    with apply(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.head_nm.ada_lin[1].bias.add_(1)
            other.blocks[0].attn.v_bias.add_(1)
        assert other.blocks[0].attn.forward.__self__ is other.blocks[0].attn
        inputs, seen = torch.randn(2, 29, 4), []
        assert not torch.equal(model(LABELS, inputs), other(LABELS, inputs))
        model.blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
        logits = model(LABELS, inputs)
        torch.testing.assert_close(checkpoint(model, LABELS, inputs, use_reentrant=False), logits)
        assert len(seen) == 2


def test_copies_and_undoing() -> None:
    """Undoing the first leaves its copy patched, which is undone by itself."""
    model = made("cosine")
    plain, applied = copy.deepcopy(model), apply(model)
    other = copy.deepcopy(model)
    expected = model.autoregressive_infer_cfg(LABELS, top_k=1)[0]
    applied.undo()
    assert vars(other.blocks[0].attn)["_fastvar"].run is not applied._run
    with patch("fastvar.integrations.var.attend_to_cache", wraps=_cache()) as ours:
        assert torch.equal(other.autoregressive_infer_cfg(LABELS, top_k=1)[0], expected) and ours.called
    with pytest.raises(ValueError, match="model: is patched already; undo that first"):
        apply(other)
    undo(other)
    undo(other)  # twice is once
    for (name, module), (_, like) in zip(everything(other), everything(plain), strict=True):
        assert vars(module).keys() == vars(like).keys(), name
    applied = apply(other)
    undo(other)
    again = apply(other)
    applied.undo()  # which has nothing of this one
    assert hasattr(other, "_fastvar")
    again.undo()


def _cache() -> Any:
    from fastvar.integrations import var

    return var.attend_to_cache


def test_two_models_share_a_tokenizer() -> None:
    """The second leaves it as it is, and goes on when the first is undone."""
    first, second = made("cosine"), made("cosine")
    second.vae_quant_proxy = first.vae_quant_proxy
    expected = [each.autoregressive_infer_cfg(LABELS, top_k=1)[0] for each in (first, second)]
    one, two = apply(first), apply(second)
    assert [(each.part, each.place, each.why) for each in two.left] == [
        ("quantizer", "vae_quant_proxy", "it is patched already, with another model")
    ]
    assert {each.part for each in two.replaced} == {"attention", "blocks", "sampler"}
    assert all(
        torch.equal(each.autoregressive_infer_cfg(LABELS, top_k=1)[0], tokens)
        for each, tokens in zip((first, second), expected, strict=True)
    )
    with pytest.raises(ValueError, match="it is patched already, with another model"):
        apply(made_of(first.vae_quant_proxy), "quantizer")
    one.undo()
    assert torch.equal(second.autoregressive_infer_cfg(LABELS, top_k=1)[0], expected[1])
    two.undo()
    for each in (first, second):
        assert not any(hasattr(module, "_fastvar") for _, module in everything(each))


def made_of(tokenizer: Any) -> Any:
    model = made("cosine")
    model.vae_quant_proxy = tokenizer
    return model


@pytest.mark.parametrize("parts", ["all", "blocks"])
def test_nothing_is_kept_from_image_to_image(parts: str) -> None:
    """Weights that an optimizer has changed in place since are read; within an image modulations are made once."""
    model, counted = made("cosine"), []
    with apply(model, parts):
        model.autoregressive_infer_cfg(LABELS, top_k=1)
        with torch.no_grad():
            for parameter in [*model.parameters(), *model.vae_quant_proxy[0].parameters()]:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        hook = model.blocks[0].ada_lin.register_forward_hook(lambda *_: counted.append(1))
        found = model.autoregressive_infer_cfg(LABELS, top_k=1)
        hook.remove()
    expected = model.autoregressive_infer_cfg(LABELS, top_k=1)
    assert torch.equal(found[0], expected[0]) and len(counted) == 1
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


class FurtherLayer(public_var.Block):
    """A fork's block, which takes something more and hands it on."""

    def forward(self, x: Any, cond_BD: Any, attn_bias: Any, shift: float = 0.0, *, hint: Any = None) -> torch.Tensor:
        return super().forward(x + shift, cond_BD, attn_bias) + (0 if hint is None else hint)


def test_a_fork_that_takes_more() -> None:
    """Calls that leave further arguments at their defaults are the operators', others the fork's."""
    block = FurtherLayer(16, 2, True, False).eval()
    x, condition, hint = torch.randn(2, 3, 16), torch.randn(2, 16), torch.randn(2, 3, 16)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = [
        ((x, condition, None), {}, True),
        ((x, condition), {"attn_bias": None, "shift": 0.0, "hint": None}, True),
        ((x, condition, None, 0.5), {}, False),
        ((x, condition, None), {"hint": hint}, False),
    ]
    expected = [block(*arguments, **named) for arguments, named, _ in calls]
    for (arguments, named, is_ours), right in zip(calls, expected, strict=True):
        with apply(block, "blocks"), patch("fastvar.integrations.var.modulations", wraps=_modulations()) as ours:
            torch.testing.assert_close(block(*arguments, **named), right, atol=1e-5, rtol=1e-5)
            assert ours.called == is_ours
    block.cross_attn = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="it has parts that the public one has not: cross_attn"):
        apply(block, "blocks")


class FurtherAttention(public_var.Attention):
    """A fork's, which is told the scale and needs no mask."""

    def forward(self, x: Any, attn_bias: Any = None, scale: int = 0) -> torch.Tensor:
        return super().forward(x + scale, attn_bias)


class OptionalMask(public_var.Attention):
    def forward(self, x: Any, attn_bias: Any = None) -> torch.Tensor:
        return super().forward(x, attn_bias)


def test_attention_of_a_fork_that_takes_more() -> None:
    """Is left, as an argument that changes from scale to scale would change who reads the cache; a default is kept."""
    with pytest.raises(ValueError, match="it has a cache, and its methods take further arguments"):
        apply(FurtherAttention(16, 2, True), "attention")
    attention, x = OptionalMask(16, 2, True).eval(), torch.randn(2, 3, 16)
    expected = attention(x)
    with apply(attention):
        torch.testing.assert_close(attention(x), expected)


class PerToken(public_var.HeadNorm):
    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD).chunk(2, -1)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


def test_conditions_of_each_token_are_the_former_methods() -> None:
    norm, x = PerToken(16), torch.randn(2, 3, 16)
    expected = norm(x, x.sin())
    with apply(norm, "blocks"):
        assert torch.equal(norm(x, x.sin()), expected)


def test_gradients_while_an_image_is_sampled() -> None:
    """Nothing with a graph is kept for the next scale."""
    model, x, condition = made("cosine"), torch.randn(2, 3, 16), torch.randn(2, 16)
    with apply(model):
        model.blocks[0].attn.kv_caching(True)
        for _ in range(2):
            model.head_nm(x, condition).sum().backward()


def timed(function: Any) -> Any:
    @wraps(function)
    def method(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    return method


class Elsewhere:
    """What a decorator has that keeps no closure."""

    calls: Any = None


def registered(function: Any) -> Any:
    Elsewhere.calls = function

    @wraps(function)
    def method(*arguments: Any) -> Any:
        return Elsewhere.calls(*arguments)

    return method


class Decorated(torch.nn.Module):
    """A fork's methods that draw."""

    @timed
    def learned(self, logits: torch.Tensor) -> torch.Tensor:
        return sample_with_top_k_top_p_(logits.detach().clone(), top_k=1) + logits

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def half(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return sample_with_top_k_top_p_(logits.clone(), top_k=1), (logits[0] @ logits[0].mT).dtype

    @torch.inference_mode()
    def inferred(self, logits: torch.Tensor) -> torch.Tensor:
        return sample_with_top_k_top_p_(logits.clone(), top_k=1)

    @torch.no_grad()
    def smooth(self, logits: torch.Tensor, more_smooth: bool = True) -> torch.Tensor:
        sample_with_top_k_top_p_(logits, top_k=2)
        return logits

    @registered
    def kept(self, logits: torch.Tensor) -> torch.Tensor:
        return sample_with_top_k_top_p_(logits, top_k=1)


def test_decorators_of_methods_that_draw() -> None:
    """Stay as they are; a method with one that cannot be copied is left."""
    model, logits = Decorated(), torch.randn(2, 3, 6, requires_grad=True)
    expected = model.smooth(logits.detach().clone())
    with (
        apply(model, "sampler") as applied,
        patch("fastvar.integrations.samplers.sample_tokens", wraps=sample_tokens) as ours,
    ):
        assert [each.why for each in applied.left] == ["Decorated.kept has a decorator that cannot be copied"]
        assert model.learned(logits).requires_grad and model.inferred(logits).is_inference()
        drawn, dtype = model.half(logits)
        assert dtype == torch.bfloat16 and torch.equal(drawn[..., 0], logits.argmax(-1))
        assert ours.call_count == 3
        assert torch.equal(model.smooth(logits.detach().clone()), expected)


def test_a_patched_model_is_not_pickled() -> None:
    model = made("cosine")
    with apply(model), pytest.raises(PicklingError, match="got a patched one; undo first, and apply in each process"):
        torch.save(model, BytesIO())
    torch.save(model, BytesIO())


def _modulations() -> Any:
    from fastvar.integrations import var

    return var.modulations


def test_it_compiles_to_one_graph() -> None:
    model, inputs = made("cosine"), torch.randn(2, 29, 4)
    with apply(model), torch.no_grad():
        expected = model(LABELS, inputs)  # looks at the mask
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(LABELS, inputs), expected)
