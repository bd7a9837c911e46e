"""bitwise_residual_quantize and accumulate_bits against their definition and the public implementation's answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden.golden import load_case
from samples import noise

from fastvar.ops import accumulate_bits, bitwise_residual_quantize
from fastvar.random import uniform
from fastvar.schedule import ScaleSchedule, infinity_schedule

RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))


def accumulated(bits: torch.Tensor, schedule: ScaleSchedule, next_input: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature map and all inputs after accumulate_bits over all scales."""
    feature_map = torch.zeros(bits.shape[0], bits.shape[2], *schedule.finest)
    inputs = [feature_map.new_zeros(bits.shape[0], 0, bits.shape[2])]
    for k, part in enumerate(bits.split(schedule.lengths, 1)):
        feature_map, following = accumulate_bits(part, feature_map, schedule, k, next_input=next_input)
        assert (following is None) == (k + 1 == len(schedule))
        if following is not None:
            inputs.append(following)
    return feature_map, torch.cat(inputs, 1)


def flips(
    schedule: ScaleSchedule, probability: list[float], seed: int, images: torch.Tensor, depth: int
) -> torch.Tensor:
    """(B, L, d) bool: which bits are flipped."""
    counter = torch.arange(schedule.num_tokens * depth)
    numbers = uniform(torch.tensor(seed), images[:, None], counter).view(len(images), -1, depth)
    return numbers < torch.tensor(probability)[list(schedule.scale_of_token)][:, None]


def definition(
    features: torch.Tensor, schedule: ScaleSchedule, next_input: str, flipped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64, with the normalisation that the public code does, a token at a time in (B, h, w, d)."""
    depth = features.shape[1]
    residual, feature_map, bits, inputs = features, torch.zeros_like(features), [], []
    for k, (h, w) in enumerate(schedule):
        pooled = F.adaptive_avg_pool2d(residual, (h, w)).permute(0, 2, 3, 1)
        unit = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        bits.append((unit > 0).flatten(1, 2))
        sent = bits[k] ^ flipped[:, schedule.starts[k] : schedule.ends[k]]
        codes = torch.where(sent, depth**-0.5, -(depth**-0.5)).double().unflatten(1, (h, w)).permute(0, 3, 1, 2)
        codes = F.interpolate(codes, schedule.finest, mode="bilinear", align_corners=False)
        residual, feature_map = residual - codes, feature_map + codes
        if k + 1 < len(schedule):
            image = F.interpolate(feature_map, schedule[k + 1], mode=next_input)
            inputs.append(image.permute(0, 2, 3, 1).flatten(1, 2))
    return torch.cat(bits, 1), feature_map, torch.cat(inputs, 1)


@pytest.mark.parametrize("probability", [None, [0.3, 0.1, 0.0, 0.2]])
@pytest.mark.parametrize("next_input", ["bilinear", "area"])
def test_definition(next_input: str, probability: list[float] | None) -> None:
    features = noise(3, 8, 5, 7, dtype=torch.float64)
    flipped = flips(RECTANGLES, probability or [0.0] * 4, 5, torch.arange(3), 8)
    got = bitwise_residual_quantize(features, RECTANGLES, next_input=next_input, flip_probability=probability, seed=5)
    expected = definition(features, RECTANGLES, next_input, flipped)
    assert torch.equal(got.bits, expected[0])
    torch.testing.assert_close(got.feature_map, expected[1])
    torch.testing.assert_close(got.teacher_forcing, expected[2])
    # the steps, fed with the bits that were sent, accumulate to the same
    steps = accumulated(got.bits ^ flipped, RECTANGLES, next_input)
    torch.testing.assert_close(steps[0], got.feature_map.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps[1], got.teacher_forcing.float(), rtol=1e-5, atol=1e-5)


def test_golden() -> None:
    """Infinity's own tokenizer and the training path without flips; its next input is the bilinear one."""
    case = load_case("infinity_tiny")
    schedule = ScaleSchedule(case.config["scale_schedule"])
    for flip_probability in (None, [0.0] * len(schedule)):
        result = bitwise_residual_quantize(case.tensors["features"], schedule, flip_probability=flip_probability)
        assert torch.equal(result.bits, case.tensors["bits"].bool())
        assert torch.equal(result.bits, case.tensors["tokenizer_bits"].bool())
        torch.testing.assert_close(result.teacher_forcing, case.tensors["next_scale_input"], rtol=1e-5, atol=1e-5)
    other = bitwise_residual_quantize(case.tensors["features"], schedule, next_input="area").teacher_forcing
    assert (other - case.tensors["next_scale_input"]).abs().max() > 0.1
    steps = accumulated(result.bits, schedule, "bilinear")
    torch.testing.assert_close(steps[0], result.feature_map, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps[1], case.tensors["next_scale_input"], rtol=1e-5, atol=1e-5)


def test_flips_do_not_depend_on_the_batch() -> None:
    features, schedule = noise(4, 8, 16, 16), infinity_schedule("0.06M")
    arguments: dict[str, Any] = {"flip_probability": [0.2] * 7, "seed": 1 << 40}
    whole = bitwise_residual_quantize(features, schedule, **arguments)
    part = bitwise_residual_quantize(features[2:3], schedule, first_image=2, **arguments)
    for a, b in zip(part, whole, strict=True):
        torch.testing.assert_close(a, b[2:3], rtol=0, atol=1e-6)
    tensor = torch.full((7,), 0.2)
    again = bitwise_residual_quantize(features, schedule, **{**arguments, "flip_probability": tensor})
    assert torch.equal(again.teacher_forcing, whole.teacher_forcing)
    other = bitwise_residual_quantize(features, schedule, **{**arguments, "seed": 2})
    assert not torch.equal(other.teacher_forcing, whole.teacher_forcing)


def test_probability_one_flips_all_and_the_label_is_the_true_bit() -> None:
    schedule = ScaleSchedule((2,))
    features = noise(1, 4, 2, 2)
    result = bitwise_residual_quantize(features, schedule, flip_probability=[1.0])
    assert torch.equal(result.bits, (features > 0).flatten(2).mT)
    assert torch.equal(result.feature_map, -features.sign() / 2)


def test_zero_gives_the_bit_zero() -> None:
    result = bitwise_residual_quantize(torch.zeros(1, 4, 2, 2), ScaleSchedule((2,)))
    assert not result.bits.any()
    assert torch.equal(result.feature_map, torch.full((1, 4, 2, 2), -0.5))
    assert result.teacher_forcing.shape == (1, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    features = noise(2, 5, 7, 8, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    result = bitwise_residual_quantize(features, RECTANGLES)
    wide = torch.promote_types(dtype, torch.float32)
    assert result.bits.dtype == torch.bool
    assert result.feature_map.dtype == result.teacher_forcing.dtype == wide
    assert all(r.is_contiguous() and not r.requires_grad for r in result)
    again = bitwise_residual_quantize(features.contiguous(), RECTANGLES)
    assert torch.equal(result.bits, again.bits)
    assert bitwise_residual_quantize(features[:0], RECTANGLES).bits.shape == (0, 52, 8)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"features": noise(2, 4, 7, 5)}, r"features: expected shape \(B, C, 5, 7\), got \(2, 4, 7, 5\)"),
    ({"features": torch.zeros(2, 4, 5, 7, dtype=torch.bool)}, r"features: expected a floating-point tensor, got"),
    ({"schedule": None}, r"schedule: expected a ScaleSchedule, got NoneType"),
    ({"next_input": "trilinear"}, r"next_input: expected 'bilinear' or 'area', got 'trilinear'"),
    ({"flip_probability": [0.1] * 3}, r"flip_probability: expected shape \(4\), got \(3,\)"),
    ({"flip_probability": [0.1] * 3 + [1.5]}, r"flip_probability: expected probabilities from 0 to 1, got"),
    (
        {"flip_probability": torch.zeros(4, dtype=torch.int64)},
        r"flip_probability: expected a floating-point tensor, got",
    ),
    ({"flip_probability": torch.zeros(4, device="meta")}, r"flip_probability: expected cpu as features, got meta"),
]


@pytest.mark.parametrize(("wrong", "message"), MISTAKES)
def test_mistakes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"bitwise_residual_quantize: {message}"):
        bitwise_residual_quantize(**{"features": noise(2, 4, 5, 7), "schedule": RECTANGLES, **wrong})


STEP_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"scale": 4}, r"scale: expected 0 to 3, got 4"),
    ({"bits": torch.zeros(2, 6, 3, dtype=torch.bool)}, r"bits: expected shape \(2, 6, 4\), got \(2, 6, 3\)"),
    ({"bits": torch.zeros(2, 6, 4)}, r"bits: expected bool, got torch\.float32"),
    ({"next_input": "nearest"}, r"next_input: expected 'bilinear' or 'area', got 'nearest'"),
    ({"feature_map": noise(2, 4, 5, 5)}, r"feature_map: expected shape \(B, C, 5, 7\), got \(2, 4, 5, 5\)"),
]


@pytest.mark.parametrize(("wrong", "message"), STEP_MISTAKES)
def test_step_mistakes(wrong: dict[str, Any], message: str) -> None:
    arguments = {
        "bits": torch.zeros(2, 6, 4, dtype=torch.bool),
        "feature_map": noise(2, 4, 5, 7),
        "schedule": RECTANGLES,
        "scale": 1,
        **wrong,
    }
    with pytest.raises(ValueError, match=f"accumulate_bits: {message}"):
        accumulate_bits(**arguments)
