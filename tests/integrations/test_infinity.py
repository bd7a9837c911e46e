"""An Infinity of the public code patched and not: the same numbers, and right ones where the public code is wrong."""

from __future__ import annotations

import copy
from functools import wraps
from types import FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fastvar.integrations import apply
from fastvar.integrations.infinity import AnySchedule, constructing, loss_weights
from tests.helpers.public_infinity import BITS, LENGTHS, SIZES, WIDTH, Block, PublicInfinity, SelfCorrection, rotations

TEXTS = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 2, 5]).int(), 3
INPUTS = torch.randn(2, sum(LENGTHS) - 1, BITS, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def trained(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits, and gradients in one row."""
    parameters = list(model.parameters())
    logits = model((TEXTS[0].to(dtype), *TEXTS[1:]), INPUTS.to(dtype), SIZES)
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    return [logits.detach(), torch.cat([g.flatten() for g in gradients])]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_training_and_sampling_agree(precision: str, padding: int) -> None:
    """As near to float64 as the plain code, and the likeliest bits exactly in float32."""
    model = PublicInfinity(padding=padding).eval()

    def both() -> tuple[Any, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return trained(model), model.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1)

    exact = trained(copy.deepcopy(model).double(), torch.float64)
    (plain, bits), applied = both(), apply(model)
    found, drawn = both()
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - right).norm() <= 2 * (theirs - right).norm() + 1e-6 * right.norm()
    assert (drawn != bits).double().mean() <= (0 if precision == "float32" else 0.05)
    assert applied.left == [] and {each.part for each in applied.replaced} == {
        "attention", "blocks", "texts", "sampler",
    }  # fmt: skip


def test_no_mask_is_made_and_texts_are_read_once_an_image() -> None:
    model, read = PublicInfinity(), []
    with apply(model) as applied:
        assert model.use_flex_attn
        with patch("tests.helpers.public_infinity.torch.where", side_effect=AssertionError):
            model(TEXTS, INPUTS, SIZES)
        with patch("fastvar.integrations.infinity.padded", side_effect=lambda *a: read.append(1) or _padded(*a)):
            model.autoregressive_infer_cfg(TEXTS, SIZES)
        assert len(read) == 3  # two blocks and the pool
    assert not model.use_flex_attn and model.attn_fn_compile_dict == {}
    assert any(each.what == "no dense mask is made" for each in applied.replaced)
    model.C = 100
    with apply(model) as applied:
        assert "a width that is a multiple of 128, it has 100" in str(applied) and not model.use_flex_attn


def test_a_block_in_16_bits() -> None:
    """Its modulation is made in float32, and what it hands on is in float32."""
    block, kinds = Block(False, shared=False).eval(), []
    block.ada_lin.register_forward_hook(lambda *results: kinds.append(results[-1].dtype))
    arguments = torch.randn(2, 17, WIDTH).bfloat16(), torch.randn(2, WIDTH), TEXTS, None, None, SIZES, rotations(), 0
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(*arguments)
        with apply(block, "blocks"):
            found = block(*arguments)
    assert kinds == [torch.float32] * 2 and found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def _padded(*arguments: Any) -> Any:
    from fastvar.integrations.attention import padded

    return padded(*arguments)


@pytest.mark.parametrize("parts", ["all", "attention", "blocks"])
def test_a_forgotten_scale_does_no_harm(parts: str) -> None:
    """A block that does not hand on which scale it is at gets the positions of a block that does."""
    model, logits = PublicInfinity(forgets=True).eval(), []
    model.head.register_forward_hook(lambda *results: logits.append(results[-1].clone()))
    model.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1)
    with apply(model, parts):
        model.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1)
    for block in model.blocks:
        block.forgets = False
    model.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1)
    wrong, found, right = logits[: len(SIZES)], logits[len(SIZES) : -len(SIZES)], logits[-len(SIZES) :]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert (wrong[1] - right[1]).abs().max() > 1e-3


def test_everything_is_restored() -> None:
    model = PublicInfinity()
    twin = copy.deepcopy(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with apply(model):
        trained(model)
        model.autoregressive_infer_cfg(TEXTS, SIZES, top_p=0.9)
        assert model.state_dict().keys() == twin.state_dict().keys()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(trained(model), trained(twin), strict=True))
    first, second = (each.autoregressive_infer_cfg(TEXTS, SIZES) for each in (model, twin))
    assert torch.equal(first, second)


def test_videos_are_left_to_the_model() -> None:
    model = PublicInfinity()
    attention, x, sizes = model.blocks[0].sa, torch.randn(1, 2, WIDTH), [(2, 1, 1)]
    rotations = {str(tuple(sizes)): model.rope2d_freqs_grid[str(tuple(SIZES))]}
    expected = attention(x, None, None, sizes, rotations)
    with apply(model, "attention"):
        assert torch.equal(attention(x, None, None, sizes, rotations), expected)


def test_what_an_image_needs_once_by_one_part_alone() -> None:
    """Without `attention`, whose methods say when an image begins."""
    model, read, kept = PublicInfinity(), [], []
    with (
        apply(model, "texts"),
        patch("fastvar.integrations.infinity.padded", side_effect=lambda *a: read.append(1) or _padded(*a)),
    ):
        model.autoregressive_infer_cfg(TEXTS, SIZES)
    assert len(read) == 3  # two blocks and the pool
    with apply(model, "blocks"):
        run = vars(model.blocks[0])["_fastvar"].run
        model.blocks[0].sa.register_forward_hook(lambda *_: kept.append(len(run._kept)))
        model.autoregressive_infer_cfg(TEXTS, SIZES)
    assert kept == [1, 3, 3]  # its own modulations at first, then also those of the other block and the head
    assert not run.sampling


def test_checkpoints_of_attention_alone() -> None:
    """Are made as the block would, with the same gradients."""
    model = PublicInfinity().train()
    expected = trained(model)
    for block in model.blocks:
        block.checkpointing_sa_only = True
    from torch.utils.checkpoint import checkpoint

    with apply(model), patch("fastvar.integrations.infinity.checkpoint", wraps=checkpoint) as checkpointed:
        found = trained(model)
        assert [call.args[0] for call in checkpointed.call_args_list] == [block.sa for block in model.blocks]
        model.eval()
        trained(model)
        assert len(checkpointed.call_args_list) == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_attention_by_schedule_of_models_made_for_flex_attention() -> None:
    """A model that asks for attention by schedule attends so in training and in sampling, before it is patched and
    after; the public constructor makes masks of types that are not there."""
    model = PublicInfinity().eval()
    expected, bits = trained(model), model.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1)

    class Flexible(PublicInfinity):
        def __init__(self) -> None:
            super().__init__()
            self.use_flex_attn, self.attn_fn_compile_dict = True, self.compile_flex_attn()

        def compile_flex_attn(self) -> Any:
            raise NotImplementedError("infinity_infer_mask_with_kv_cache not supported")

    with pytest.raises(NotImplementedError):
        Flexible()
    with constructing(Flexible):
        flexible = Flexible().eval()
    with pytest.raises(NotImplementedError):
        Flexible()
    flexible.load_state_dict(model.state_dict())
    flexible.rope2d_freqs_grid = model.rope2d_freqs_grid
    for _ in range(2):
        found = trained(flexible)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(flexible.autoregressive_infer_cfg(TEXTS, SIZES, top_k=1), bits)
        if not hasattr(flexible, "_fastvar"):
            flexible.attn_fn_compile_dict = {}  # as a constructor that has no such mask leaves it
            apply(flexible)


def test_schedules_of_videos_are_not_there() -> None:
    schedules = AnySchedule()
    assert schedules.get(((2, 1, 1),)) is None and schedules.get(((2, 1, 1),), 5) == 5
    assert callable(schedules.get(tuple(SIZES))) and schedules.get(tuple(SIZES)) is schedules[tuple(SIZES)]
    with pytest.raises(ValueError, match=r"scale_schedule: expected grids of images, got \(\(2, 1, 1\),\)"):
        schedules[((2, 1, 1),)]


def test_which_scales_have_flips() -> None:
    """The first `noise_apply_layers` of them."""
    features, flipping = torch.randn(2, BITS, 3, 4), SelfCorrection(strength=1.0)
    expected, bits = flipping.flip_requant(SIZES, None, features, "cpu")
    with apply(flipping), patch("numpy.random.randint", return_value=np.full(len(SIZES), 100)):
        for layers, sign in ((0, 1), (1, -1)):
            flipping.noise_apply_layers = layers
            inputs, found = flipping.flip_requant(SIZES, None, features, "cpu")
            torch.testing.assert_close(inputs[:, :4], sign * expected[:, :4])
            assert torch.equal(found[0], bits[0])
        # the second scale is not flipped: its codes are those of its bits
        codes = (2.0 * found[1] - 1).mT.unflatten(2, (2, 2)) * BITS**-0.5
        first = -(2.0 * found[0] - 1).mT.unflatten(2, (1, 1)) * BITS**-0.5
        total = sum(torch.nn.functional.interpolate(each, (3, 4), mode="bilinear") for each in (first, codes))
        torch.testing.assert_close(inputs[:, 4:], total.flatten(2).mT)


class Trainer:
    """Which weighs the losses of scales."""

    def __init__(self) -> None:
        self.reweight_loss_by_scale, self.bitwise_self_correction = True, SelfCorrection()

    TIMES = 1

    def train_step(self, scale_schedule: Any, times: int = TIMES, *, fail: bool = False) -> torch.Tensor:
        if fail:
            return self.__helper("""text
at the margin""")
        weights: list[float] = []
        if self.reweight_loss_by_scale:
            last_scale_area = np.sqrt(scale_schedule[-1].prod())
            for t, h, w in scale_schedule:
                weights.extend([last_scale_area / np.sqrt(t * h * w)] * (t * h * w))
        lw = torch.tensor(weights)
        return times * lw / lw.sum()

    def __helper(self, text: str) -> torch.Tensor:
        raise ValueError(text)


def test_a_trainers_loss() -> None:
    """The line that is wrong is put right, and nothing else is another."""
    trainer = Trainer()
    with pytest.raises(AttributeError, match="prod"):
        trainer.train_step(SIZES)
    with apply(trainer) as applied:
        torch.testing.assert_close(trainer.train_step(SIZES).float(), loss_weights(SIZES))
        torch.testing.assert_close(trainer.train_step(SIZES, 2).float(), 2 * loss_weights(SIZES))
        with pytest.raises(ValueError, match="text\nat the margin") as raised:
            trainer.train_step(SIZES, fail=True)
        assert any("return self.__helper(" in str(entry.statement) for entry in raised.traceback)
        assert "note: reweight_loss_by_scale works, where the public code stops with an error" in str(applied)
        assert [each.part for each in applied.replaced] == ["loss", "quantizer"]
    with pytest.raises(AttributeError, match="prod"):
        trainer.train_step(SIZES)


def test_a_trainers_loss_is_left() -> None:
    """Where a method is wrapped, or its text is not that of what runs."""
    former = Trainer.train_step

    class Wrapped(Trainer):
        @wraps(former)
        def train_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            return former(self, *arguments, **named)

    class Changed(Trainer):
        train_step = FunctionType(former.__code__.replace(co_consts=(*former.__code__.co_consts, 5)), globals())

    for trainer in (Wrapped(), Changed()):
        with apply(trainer) as applied:
            assert [each.part for each in applied.replaced] == ["quantizer"]
            assert "cannot be made anew of its text" in applied.left[0].why


def test_self_correction() -> None:
    features = torch.randn(2, BITS, 3, 4)
    plain = SelfCorrection()
    expected = plain.flip_requant(SIZES, None, features, "cpu")
    with apply(plain, "quantizer"):
        inputs, bits = plain.flip_requant(SIZES, None, features[:, :, None], "cpu")
    torch.testing.assert_close(inputs, expected[0])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(bits, expected[1], strict=True))
    flipping = SelfCorrection(strength=0.3)
    with apply(flipping):
        first, second = (flipping.flip_requant(SIZES, None, features, "cpu") for _ in range(2))
    assert torch.equal(first[1][0], bits[0]) and not torch.equal(first[0], second[0])
    flipping.apply_spatial_patchify = True
    with pytest.raises(ValueError, match="got SelfCorrection: its tokens are patches of 2 x 2"):
        apply(flipping)


def test_weights_of_the_loss() -> None:
    """In inverse proportion to the root of a grid's area."""
    weights = loss_weights(SIZES)
    assert weights.shape == (17,) and weights.sum().item() == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(2) and weights[1] / weights[-1] == pytest.approx(3**0.5)
