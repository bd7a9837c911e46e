"""bitwise_residual_quantize and accumulate_bits against their definition and the public implementation's answers."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops import _checks, accumulate_bits, bitwise_residual_quantize
from fastvar.ops._extension import missing
from fastvar.random import uniform
from fastvar.schedule import ScaleSchedule, infinity_schedule
from tests.golden.golden import GoldenCase, load_case
from tests.helpers.samples import noise

RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))
# planes of every kind: one token, rows or columns of one, more than 32 columns, cells that eight do not divide
SHAPES = [
    RECTANGLES,
    ScaleSchedule((1,)),
    ScaleSchedule((1, (1, 4), (1, 37))),
    ScaleSchedule(((2, 1), (40, 1))),
    ScaleSchedule((3, 3, (5, 34))),
]
built = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BACKENDS = ["reference", pytest.param("cpu", marks=built)]


def accumulated(
    bits: torch.Tensor, schedule: ScaleSchedule, next_input: str, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature map and all inputs after accumulate_bits over all scales."""
    feature_map = torch.zeros(bits.shape[0], bits.shape[2], *schedule.finest)
    inputs = [feature_map.new_zeros(bits.shape[0], 0, bits.shape[2])]
    for k, part in enumerate(bits.split(schedule.lengths, 1)):
        feature_map, following = accumulate_bits(part, feature_map, schedule, k, next_input=next_input, backend=backend)
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


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return load_case("infinity_tiny")


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(case: GoldenCase, backend: str) -> None:
    """Infinity's own tokenizer and the training path without flips; its next input is the bilinear one."""
    schedule, features = ScaleSchedule(case.config["scale_schedule"]), case.tensors["features"]
    for probability in (None, [0.0] * len(schedule)):
        result = bitwise_residual_quantize(features, schedule, flip_probability=probability, backend=backend)
        assert torch.equal(result.bits, case.tensors["bits"].bool())
        assert torch.equal(result.bits, case.tensors["tokenizer_bits"].bool())
        torch.testing.assert_close(result.teacher_forcing, case.tensors["next_scale_input"], rtol=1e-5, atol=1e-5)
    other = bitwise_residual_quantize(features, schedule, next_input="area", backend=backend).teacher_forcing
    assert (other - case.tensors["next_scale_input"]).abs().max() > 0.1
    steps = accumulated(result.bits, schedule, "bilinear", backend)
    torch.testing.assert_close(steps[0], result.feature_map, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps[1], case.tensors["next_scale_input"], rtol=1e-5, atol=1e-5)


def residuals(
    features: torch.Tensor, sent: torch.Tensor, schedule: ScaleSchedule, next_input: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: the residuals (B, L, d) that the bits sent before leave, the feature map and the inputs."""
    depth, found, inputs = features.shape[1], [], []
    feature_map = torch.zeros_like(features, dtype=torch.float64)
    for k, (h, w) in enumerate(schedule):
        found.append(F.adaptive_avg_pool2d(features - feature_map, (h, w)).flatten(2).mT)
        bits = sent[:, schedule.starts[k] : schedule.ends[k]].mT.unflatten(2, (h, w))
        codes = torch.where(bits, depth**-0.5, -(depth**-0.5)).double()
        feature_map = feature_map + F.interpolate(codes, schedule.finest, mode="bilinear")
        if k + 1 < len(schedule):
            inputs.append(F.interpolate(feature_map, schedule[k + 1], mode=next_input).flatten(2).mT)
    empty = feature_map.new_zeros(features.shape[0], 0, depth)
    return torch.cat(found, 1), feature_map, torch.cat([empty, *inputs], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", [*SHAPES, infinity_schedule("1M", "2.500")], ids=str)
def test_every_bit_is_the_sign_of_its_residual(schedule: ScaleSchedule, backend: str) -> None:
    """Up to roundings of the residual, in which hardly a bit lies; flips are the generator's, bit for bit."""
    probability = [0.1] * len(schedule)
    for next_input, seed, first in (("bilinear", -3, 7), ("area", 2**63 - 1, 2**32 - 1)):
        features = noise(2, 11, *schedule.finest).transpose(2, 3).contiguous().transpose(2, 3)  # columns lie adjacent
        got = bitwise_residual_quantize(
            features, schedule, next_input=next_input, flip_probability=probability, seed=seed, first_image=first,
            backend=backend,
        )  # fmt: skip
        sent = got.bits ^ flips(schedule, probability, seed, torch.arange(first, first + 2), 11)
        residual, feature_map, inputs = residuals(features.double(), sent, schedule, next_input)
        wrong = got.bits != (residual > 0)
        # of a mean of up to 4000 features of order 1, and a sum of as many codes as there are scales
        assert not wrong[residual.abs() > 1e-6 * len(schedule)].any()
        assert wrong.sum() <= 1e-4 * wrong.numel()
        torch.testing.assert_close(got.feature_map.double(), feature_map, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.teacher_forcing.double(), inputs, rtol=1e-5, atol=1e-5)


@built
@pytest.mark.parametrize("ranks", [1, 3, 32, 64])
@pytest.mark.parametrize("schedule", SHAPES, ids=str)
def test_blocks_of_threads_find_the_same(schedule: ScaleSchedule, ranks: int) -> None:
    """The CUDA kernels' arithmetic, index by index, by threads that stand for those of a block: bit-equal to what a
    thread makes of eight channels at a time."""
    library, (height, width), depth = torch.ops.fastvar_cpu, schedule.finest, 9
    features, probability = noise(2, depth, height, width), torch.full((len(schedule),), 0.2)
    for next_input in ("bilinear", "area"):
        expected = bitwise_residual_quantize(
            features, schedule, next_input=next_input, flip_probability=probability, seed=4, backend="cpu"
        )
        results = [torch.full_like(tensor, 1) for tensor in expected]
        area = next_input == "area"
        library.bitwise_residual_quantize(features, probability, schedule.flat, area, 4, 0, *results, ranks)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        for k, grid in enumerate(schedule):
            following = schedule[k + 1] if k + 1 < len(schedule) else (0, 0)
            bits = expected.bits[:, schedule.starts[k] : schedule.ends[k]].contiguous()
            step = accumulate_bits(bits, features, schedule, k, next_input=next_input, backend="cpu")
            made = torch.empty_like(features), torch.empty(2, following[0] * following[1], depth)
            library.accumulate_bits(features, bits, *grid, *following, area, *made, ranks)
            assert torch.equal(made[0], step.feature_map)
            assert step.next_input is None or torch.equal(made[1], step.next_input)


@built
@pytest.mark.parametrize("next_input", ["bilinear", "area"])
def test_step_in_cpp(next_input: str) -> None:
    """Results and gradients are the reference's, also of infinite maps and half precision."""
    for schedule in SHAPES:
        for k, length in enumerate(schedule.lengths):
            bits = noise(2, length, 11, seed=k) > 0
            found = []
            for backend in ("reference", "cpu"):
                feature_map = noise(2, 11, *schedule.finest, dtype=torch.bfloat16)
                feature_map[0, 3, 0, -1], feature_map[1, 10, -1, 0] = float("inf"), -float("inf")
                feature_map.requires_grad_()
                step = accumulate_bits(bits, feature_map, schedule, k, next_input=next_input, backend=backend)
                results = [result for result in step if result is not None]
                weights = [noise(*result.shape, seed=5) for result in results]
                found.append([*results, *torch.autograd.grad(results, feature_map, weights)])
            for plain, own in zip(*found, strict=True):
                # the gradient is a rounded bfloat16
                torch.testing.assert_close(own, plain, equal_nan=True, **({} if own.dtype == torch.bfloat16 else CLOSE))


@built
@pytest.mark.parametrize("next_input", ["bilinear", "area"])
def test_gradient_of_a_step_is_rounded_once(next_input: str) -> None:
    """No product in float32 is in it, which a GPU may be told to do with fewer digits."""
    schedule, found = ScaleSchedule((1, (20, 31), (40, 37))), []
    weights = noise(2, 620, 9)
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        feature_map = noise(2, 9, 40, 37, dtype=dtype).requires_grad_()
        bits = torch.zeros(2, 1, 9, dtype=torch.bool)
        following = accumulate_bits(bits, feature_map, schedule, 0, next_input=next_input, backend=backend).next_input
        assert following is not None
        found.extend(torch.autograd.grad(following, feature_map, weights.to(dtype)))
    torch.testing.assert_close(found[1].double(), found[0], rtol=2**-24, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays within its channel and writes nowhere else; in debug mode it is an error."""
    features = noise(2, 9, 5, 7)
    features[0, 1, 2, 3], features[1, 4], features[1, 5, 0, 0] = float("nan"), float("inf"), -float("inf")
    broken = ~features.isfinite().all(-1).all(-1)
    bits, feature_map, inputs = bitwise_residual_quantize(features, RECTANGLES, backend=backend)
    expected = bitwise_residual_quantize(features.nan_to_num(0, 0, 0), RECTANGLES, backend=backend)
    assert torch.isfinite(feature_map).all() and torch.isfinite(inputs).all()
    assert torch.equal(bits.mT[~broken], expected.bits.mT[~broken])
    assert torch.equal(feature_map[~broken], expected.feature_map[~broken])
    assert bits[1, :, 4].all() and not bits[0, 0, 1]
    step = accumulate_bits(bits[:, :1], features, RECTANGLES, 0, backend=backend)
    assert torch.equal(step.feature_map.isfinite(), features.isfinite())

    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match="bitwise_residual_quantize: features: expected finite numbers, got 37 that"):
        bitwise_residual_quantize(features, RECTANGLES, backend=backend)
    with pytest.raises(ValueError, match="accumulate_bits: feature_map: expected finite numbers, got 37 that"):
        accumulate_bits(bits[:, :1], features, RECTANGLES, 0, backend=backend)
    bitwise_residual_quantize(features.nan_to_num(0, 0, 0), RECTANGLES, backend=backend)


def test_debug_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("FASTVAR_DEBUG", value)
        assert runpy.run_path(str(_checks.__file__))["DEBUG"] is expected


@built
def test_results_end_where_they_end() -> None:
    """Written into the middle of larger tensors, with a number of channels that eight does not divide."""
    schedule, depth = ScaleSchedule((1, (2, 3), (5, 7))), 9
    features = noise(2, depth, 5, 7)
    features[0, 0, 0, 0] = float("nan")
    shapes = [(2, 42, depth), (2, depth, 5, 7), (2, 41, depth)]
    room = [torch.full((4, *shape[1:]), 3, dtype=dtype) for shape, dtype in zip(
        shapes, (torch.uint8, torch.float32, torch.float32), strict=True)]  # fmt: skip
    results = [room[0][1:3].view(torch.bool), room[1][1:3], room[2][1:3]]
    torch.ops.fastvar_cpu.bitwise_residual_quantize(features, torch.empty(0), schedule.flat, False, 0, 0, *results)
    for tensor in room:
        assert (tensor[[0, 3]] == 3).all() and not (tensor[1:3] == 3).any()


def with_gap(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, of which the last dimension does not follow on the one before."""
    return torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1]


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"features": torch.zeros(2, 9, 7, 5)}, r"features: expected shape \(\*, \*, 5, 7\), got \(2, 9, 7, 5\)"),
    ({"features": torch.zeros(9, 5, 7)}, r"features: expected shape .*, got \(9, 5, 7\)"),
    ({"features": torch.zeros(2, 9, 5, 7, dtype=torch.float64)}, "features: expected another dtype"),
    ({"features": with_gap(2, 9, 5, 7)}, "features: expected a contiguous tensor"),
    ({"flip_probability": torch.zeros(2)}, r"flip_probability: expected shape \(3\), got \(2\)"),
    ({"grids": []}, "grids: expected height and width of each, got 0 numbers"),
    ({"grids": [1, 1, 5, 7, 5]}, "grids: expected height and width of each, got 5 numbers"),
    ({"grids": [1, 1, 0, 3, 5, 7]}, "grids: expected 1 to 5, got 0"),
    ({"grids": [1, 1, 2, 8, 5, 7]}, "grids: expected 1 to 7, got 8"),
    ({"grids": [1, 1, 2, 3, 1 << 15, 7]}, "grids: expected 1 to 16384, got 32768"),
    ({"grids": [1, 1, 2, 2, 5, 7]}, r"bits: expected shape \(2, 40, 9\), got \(2, 42, 9\)"),
    ({"bits": torch.zeros(2, 42, 9)}, "bits: expected another dtype"),
    ({"feature_map": torch.zeros(1, 9, 5, 7)}, r"feature_map: expected shape \(2, 9, 5, 7\), got \(1, 9, 5, 7\)"),
    ({"inputs": torch.zeros(2, 40, 9)}, r"inputs: expected shape \(2, 41, 9\), got \(2, 40, 9\)"),
    ({"ranks": -1}, "ranks: expected 0 to 1024, got -1"),
    ({"ranks": 48}, "ranks: expected up to 32 or a multiple of it, got 48"),
]


@built
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS)
def test_the_op_refuses_what_does_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Called without the public function's checks, it reads and writes nothing past an end."""
    arguments: dict[str, Any] = {
        "features": torch.zeros(2, 9, 5, 7), "flip_probability": torch.zeros(3), "grids": [1, 1, 2, 3, 5, 7],
        "area": False, "seed": 0, "first_image": 0, "bits": torch.zeros(2, 42, 9, dtype=torch.bool),
        "feature_map": torch.zeros(2, 9, 5, 7), "inputs": torch.zeros(2, 41, 9), "ranks": 0,
    }  # fmt: skip
    torch.ops.fastvar_cpu.bitwise_residual_quantize(**arguments)
    with pytest.raises(RuntimeError, match=f"bitwise_residual_quantize: {message}"):
        torch.ops.fastvar_cpu.bitwise_residual_quantize(**{**arguments, **wrong})


BAD_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"feature_map": torch.zeros(2, 9, 0, 7)}, "finest grid: expected 1 to 16384, got 0"),
    ({"feature_map": torch.zeros(2, 5, 7)}, r"feature_map: expected shape .*, got \(2, 5, 7\)"),
    ({"feature_map": with_gap(2, 9, 5, 7)}, "feature_map: expected a contiguous tensor"),
    ({"height": 6}, "grid: expected 1 to 5, got 6"),
    ({"width": 0}, "grid: expected 1 to 7, got 0"),
    ({"width": 2}, r"bits: expected shape \(2, 4, 9\), got \(2, 6, 9\)"),
    ({"next_height": 0}, "next grid: expected 1 to 5, got 0"),
    ({"next_width": 8}, "next grid: expected 1 to 7, got 8"),
    ({"bits": torch.zeros(2, 6, 9, dtype=torch.uint8)}, "bits: expected another dtype"),
    ({"bits": with_gap(2, 6, 9, dtype=torch.bool)}, "bits: expected a contiguous tensor"),
    ({"accumulated": torch.zeros(2, 9, 5, 6)}, r"accumulated: expected shape .*, got \(2, 9, 5, 6\)"),
    ({"next_input": torch.zeros(2, 9, 9)}, r"next_input: expected shape \(2, 10, 9\), got \(2, 9, 9\)"),
    ({"ranks": 1025}, "ranks: expected 0 to 1024, got 1025"),
]


@built
@pytest.mark.parametrize(("wrong", "message"), BAD_STEPS)
def test_the_step_refuses_what_does_not_fit(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "feature_map": torch.zeros(2, 9, 5, 7), "bits": torch.zeros(2, 6, 9, dtype=torch.bool), "height": 2, "width": 3,
        "next_height": 2, "next_width": 5, "area": True, "accumulated": torch.zeros(2, 9, 5, 7),
        "next_input": torch.zeros(2, 10, 9), "ranks": 0,
    }  # fmt: skip
    torch.ops.fastvar_cpu.accumulate_bits(**arguments)
    with pytest.raises(RuntimeError, match=f"accumulate_bits: {message}"):
        torch.ops.fastvar_cpu.accumulate_bits(**{**arguments, **wrong})


@built
def test_the_registered_step_refuses_a_grid_above_the_finest() -> None:
    feature_map, bits = noise(1, 8, 2, 2), torch.ones(1, 40000, 8, dtype=torch.bool)
    accumulate_bits(bits[:, :1], feature_map, ScaleSchedule((1, 2)), 0, backend="cpu")  # which loads the library
    with pytest.raises(RuntimeError, match="accumulate_bits: grid: expected 1 to 2, got 200"):
        torch.ops.fastvar.accumulate_bits(feature_map, bits, 200, 200, 0, 0, "area", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_flips_do_not_depend_on_the_batch(backend: str) -> None:
    features, schedule = noise(4, 8, 16, 16), infinity_schedule("0.06M")
    arguments: dict[str, Any] = {"flip_probability": [0.2] * 7, "seed": 1 << 40, "backend": backend}
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
