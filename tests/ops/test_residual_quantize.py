"""residual_quantize and accumulate_scale against their definition and against the public implementation's answers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastvar.kernels.residual_quantize import reference
from fastvar.kernels.residual_quantize.gradients import accumulate_scale_backward
from torch._dynamo.testing import CompileCounter

from fastvar.ops import ResidualConv, accumulate_scale, residual_conv_index, residual_quantize
from fastvar.ops.residual_quantize import _ACCUMULATE, AccumulateCall, ScaleConv
from fastvar.schedule import VAR_256, ScaleSchedule
from tests.golden.golden import GoldenCase, load_case
from tests.helpers.samples import noise

RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))


def make_phi(channels: int, num_scales: int, count: int = 2, dtype: torch.dtype = torch.float32) -> ResidualConv:
    weight = noise(count, channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    return ResidualConv(weight, noise(count, channels, dtype=dtype) * 0.1, 0.5, residual_conv_index(num_scales, count))


def accumulated(
    tokens: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule, phi: ResidualConv | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature map and all inputs after accumulate_scale over all scales."""
    feature_map = torch.zeros(len(tokens), codebook.shape[1], *schedule.finest, dtype=codebook.dtype)
    inputs = [feature_map.new_zeros(len(tokens), 0, codebook.shape[1])]
    for k, part in enumerate(tokens.split(schedule.lengths, 1)):
        feature_map, next_input = accumulate_scale(part, feature_map, codebook, schedule, k, phi=phi)
        assert (next_input is None) == (k + 1 == len(schedule))
        if next_input is not None:
            inputs.append(next_input)
    return feature_map, torch.cat(inputs, 1)


# The definition, in float64 and with resampling written out as matrices.


def area_matrix(fine: int, coarse: int) -> torch.Tensor:
    matrix = torch.zeros(coarse, fine, dtype=torch.float64)
    for i in range(coarse):
        low, high = math.floor(i * fine / coarse), math.ceil((i + 1) * fine / coarse)
        matrix[i, low:high] = 1 / (high - low)
    return matrix


def bicubic_matrix(coarse: int, fine: int) -> torch.Tensor:
    a = -0.75
    matrix = torch.zeros(fine, coarse, dtype=torch.float64)
    for y in range(fine):
        source = (y + 0.5) * coarse / fine - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            x = abs(source - tap)
            inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
            outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[y, min(max(tap, 0), coarse - 1)] += inner if x <= 1 else outer
    return matrix


def resized(image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.einsum("yi,bcij,xj->bcyx", rows, image, columns)


def convolved(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    padded = image.new_zeros(*image.shape[:2], height + 2, width + 2)
    padded[..., 1:-1, 1:-1] = image
    out = bias[:, None, None].expand(len(image), -1, height, width)
    for dy in range(3):
        for dx in range(3):
            out = out + torch.einsum(
                "oc,bcyx->boyx", weight[:, :, dy, dx], padded[..., dy : dy + height, dx : dx + width]
            )
    return out


def definition(
    features: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule, phi: ResidualConv | None, znorm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual, feature_map, tokens, inputs = features, torch.zeros_like(features), [], []
    height, width = schedule.finest
    for k, (h, w) in enumerate(schedule):
        pooled = resized(residual, area_matrix(height, h), area_matrix(width, w))
        rows = pooled.permute(0, 2, 3, 1).flatten(1, 2)
        if znorm:
            rows = rows / rows.norm(dim=-1, keepdim=True)
            nearest = (rows @ (codebook / codebook.norm(dim=1, keepdim=True)).T).argmax(-1)
        else:
            nearest = (rows[:, :, None] - codebook).square().sum(-1).argmin(-1)
        codes = codebook[nearest].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        codes = resized(codes, bicubic_matrix(h, height), bicubic_matrix(w, width))
        if phi is not None:
            i = phi.index[k]
            codes = (1 - phi.ratio) * codes + phi.ratio * convolved(codes, phi.weight[i], phi.bias[i])
        residual, feature_map = residual - codes, feature_map + codes
        tokens.append(nearest)
        if k + 1 < len(schedule):
            h, w = schedule[k + 1]
            pooled = resized(feature_map, area_matrix(height, h), area_matrix(width, w))
            inputs.append(pooled.permute(0, 2, 3, 1).flatten(1, 2))
    return torch.cat(tokens, 1), feature_map, torch.cat(inputs, 1)


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("with_phi", [False, True])
@pytest.mark.parametrize("schedule", [RECTANGLES, VAR_256, ScaleSchedule((2, 2, (3, 2)))], ids=str)
def test_definition(schedule: ScaleSchedule, with_phi: bool, znorm: bool) -> None:
    features = noise(2, 4, *schedule.finest, dtype=torch.float64)
    codebook = noise(37, 4, dtype=torch.float64, seed=1)
    phi = make_phi(4, len(schedule), dtype=torch.float64) if with_phi else None
    got = residual_quantize(features, codebook, schedule, phi=phi, znorm=znorm)
    expected = definition(features, codebook, schedule, phi, znorm)
    assert torch.equal(got.tokens, expected[0])
    torch.testing.assert_close(got.feature_map, expected[1])
    torch.testing.assert_close(got.teacher_forcing, expected[2])


@pytest.mark.parametrize("with_phi", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_give_the_same(dtype: torch.dtype, with_phi: bool) -> None:
    """All scales at once and one by one; results are in float32, or float64 for float64."""
    wide = torch.promote_types(dtype, torch.float32)
    phi = make_phi(6, len(RECTANGLES)) if with_phi else None
    codebook = noise(50, 6, dtype=wide, seed=1)
    result = residual_quantize(noise(3, 6, 5, 7, dtype=dtype), codebook, RECTANGLES, phi=phi)
    assert result.tokens.dtype == torch.int64
    assert result.feature_map.dtype == result.teacher_forcing.dtype == wide
    for got, expected in zip(accumulated(result.tokens, codebook, RECTANGLES, phi), result[1:3], strict=True):
        torch.testing.assert_close(got, expected)
    step = accumulate_scale(
        result.tokens[:, :1].int(), noise(3, 6, 5, 7, dtype=dtype), codebook, RECTANGLES, 0, phi=phi
    )
    assert step.feature_map.dtype == wide


@pytest.mark.parametrize("name", ["var_tiny", "var_tiny_shared_adaln"])
def test_golden_tokens_accumulate_to_the_golden_feature_map(name: str) -> None:
    case = load_case(name)
    schedule, codebook, phi = golden_tokenizer(case)
    feature_map, inputs = accumulated(case.tensors["tokens"], codebook, schedule, phi)
    torch.testing.assert_close(feature_map, case.tensors["f_hat"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs, case.tensors["next_scale_input"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["var_tiny", "var_tiny_shared_adaln"])
def test_golden_codes_are_found_again(name: str) -> None:
    """A code of each scale alone, upsampled as the golden tokenizer does, is quantised to what it came from."""
    schedule, codebook, _ = golden_tokenizer(load_case(name))
    tokens = torch.arange(schedule.lengths[-1])[None] % len(codebook)
    features = codebook[tokens].mT.unflatten(2, schedule.finest)
    found = residual_quantize(features, codebook, ScaleSchedule(schedule.grids[-1:]))
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.feature_map, features)
    assert found.teacher_forcing.shape == (1, 0, codebook.shape[1])


def golden_tokenizer(case: GoldenCase) -> tuple[ScaleSchedule, torch.Tensor, ResidualConv]:
    schedule = ScaleSchedule(case.config["patch_nums"])
    count = case.config["share_quant_resi"]
    names = ["quantize.quant_resi.qresi"]
    if count > 1:
        names = [f"quantize.quant_resi.qresi_ls.{i}" for i in range(count)]
    weight = torch.stack([case.tokenizer[f"{n}.weight"] for n in names])
    bias = torch.stack([case.tokenizer[f"{n}.bias"] for n in names])
    phi = ResidualConv(weight, bias, 0.5, residual_conv_index(len(schedule), count))
    return schedule, case.tokenizer["quantize.embedding.weight"], phi


def test_residual_conv_index_of_the_public_checkpoints() -> None:
    assert residual_conv_index(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert residual_conv_index(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert residual_conv_index(10, 1) == (0,) * 10
    assert residual_conv_index(1, 4) == residual_conv_index(1, 1) == (0,)


def test_residual_conv_index_rounds_as_numpy() -> None:
    for count in range(1, 20):
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(margin, 1 - margin, count)
        for scales in range(2, 21):
            expected = tuple(int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales))
            assert residual_conv_index(scales, count) == expected


def test_ties_go_to_the_lowest_index() -> None:
    codebook = noise(5, 3).repeat(3, 1)
    features = noise(2, 3, 4, 4, seed=1)
    for znorm in (False, True):
        assert residual_quantize(features, codebook, ScaleSchedule((1, 2, 4)), znorm=znorm).tokens.max() < 5


def test_znorm_compares_directions_and_adds_codes() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 100.0], [-3.0, 0.0]])
    features = torch.tensor([[5.0, 2.0], [3.0, 4.0]]).mT.reshape(1, 2, 1, 2)
    result = residual_quantize(features, codebook, ScaleSchedule([(1, 2)]), znorm=True)
    assert result.tokens.tolist() == [[0, 1]]
    assert torch.equal(result.feature_map[0, :, 0].mT, codebook[[0, 1]])
    assert residual_quantize(features, codebook, ScaleSchedule([(1, 2)])).tokens.tolist() == [[0, 0]]


def test_rows_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, codebook = noise(2, 4, 16, 16), noise(64, 4, seed=1)
    for znorm in (False, True):
        whole = residual_quantize(features, codebook, VAR_256, znorm=znorm)
        monkeypatch.setattr(reference, "_DISTANCES", 300)
        assert torch.equal(residual_quantize(features, codebook, VAR_256, znorm=znorm).tokens, whole.tokens)
        monkeypatch.undo()


def test_strides_do_not_matter() -> None:
    features = noise(2, 4, 5, 7)
    codebook, phi = noise(20, 4, seed=1), make_phi(4, len(RECTANGLES))
    expected = residual_quantize(features, codebook, RECTANGLES, phi=phi)
    wide = torch.stack([features, features], -1)[..., 0]
    columns = codebook.T.contiguous().T
    for view in (features.contiguous(memory_format=torch.channels_last), wide):
        got = residual_quantize(view, columns, RECTANGLES, phi=phi)
        assert torch.equal(got.tokens, expected.tokens)
        assert all(r.is_contiguous() for r in got)
        torch.testing.assert_close(got.feature_map, expected.feature_map)


def test_an_image_does_not_depend_on_the_batch() -> None:
    features, codebook = noise(5, 4, 16, 16), noise(64, 4, seed=1)
    whole = residual_quantize(features, codebook, VAR_256)
    part = residual_quantize(features[3:4], codebook, VAR_256)
    assert torch.equal(part.tokens, whole.tokens[3:4])
    assert torch.equal(whole.usage, whole.tokens.flatten().bincount(minlength=64))
    assert residual_quantize(features[:0], codebook, VAR_256).teacher_forcing.shape == (0, 679, 4)


def test_no_gradient_from_quantisation() -> None:
    features, codebook = noise(1, 4, 5, 7).requires_grad_(), noise(9, 4).requires_grad_()
    phi = make_phi(4, len(RECTANGLES))
    phi = phi._replace(weight=phi.weight.requires_grad_(), bias=phi.bias.requires_grad_())
    assert not any(r.requires_grad for r in residual_quantize(features, codebook, RECTANGLES, phi=phi))


def test_gradients_reach_the_convolution_that_was_used() -> None:
    phi = make_phi(4, len(RECTANGLES), count=3)
    phi = phi._replace(weight=phi.weight.requires_grad_(), bias=phi.bias.requires_grad_(), index=(0, 2, 2, 1))
    codebook = noise(9, 4).requires_grad_()
    step = accumulate_scale(torch.tensor([[0, 1, 2, 3, 4, 4]]), noise(1, 4, 5, 7), codebook, RECTANGLES, 1, phi=phi)
    assert step.next_input is not None
    (step.feature_map.square().mean() + step.next_input.sum()).backward()
    for gradient in (phi.weight.grad, phi.bias.grad):
        assert gradient is not None
        assert [bool(part.any()) for part in gradient] == [False, False, True]
    assert codebook.grad is not None
    assert [bool(row.any()) for row in codebook.grad] == [True] * 5 + [False] * 4


@pytest.mark.parametrize("with_phi", [False, True])
@pytest.mark.parametrize("scale", [0, 1, 3])
def test_gradients_written_out(scale: int, with_phi: bool) -> None:
    """Those of implementations without a forward that can be differentiated, against autograd."""
    phi = make_phi(4, len(RECTANGLES))
    convolution = ScaleConv(phi.weight[0], phi.bias[0], 0.3) if with_phi else None
    following = RECTANGLES[scale + 1] if scale < 3 else (0, 0)
    tokens = torch.arange(2 * RECTANGLES.lengths[scale]).view(2, -1) % 7
    grids = (*RECTANGLES[scale], *following)
    call = AccumulateCall(noise(2, 4, 5, 7), tokens, noise(9, 4, seed=1), convolution, *grids)
    leaves = {"feature_map": call.feature_map, "codebook": call.codebook}
    if convolution is not None:
        leaves |= {"phi_weight": convolution.weight, "phi_bias": convolution.bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    results = reference.accumulate_scale(call)
    grads = [noise(*r.shape, seed=5) for r in results]
    for given in (grads, [grads[0], None], [None, grads[1]]):
        pairs = [(r, g) for r, g in zip(results, given, strict=True) if g is not None and r.requires_grad]
        if not pairs:  # of the last scale's next input
            continue
        outputs, weights = zip(*pairs, strict=True)
        expected = torch.autograd.grad(
            outputs, list(leaves.values()), weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        nothing = dict.fromkeys(("feature_map", "codebook", "phi_weight", "phi_bias"), False)
        for wanted in (leaves, *([name] for name in leaves)):
            needs = SimpleNamespace(**nothing | dict.fromkeys(wanted, True))
            with torch.no_grad():
                found = accumulate_scale_backward(call, (), given, needs)
            for name, exact in zip(leaves, expected, strict=True):
                if name in wanted:
                    torch.testing.assert_close(found[name], exact, rtol=1e-5, atol=1e-5)


def test_the_op_compiles_once_for_all_grids() -> None:
    """Two graphs in all: for the first grid, and for every other one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    phi, codebook, feature_map = make_phi(4, 10, 4), noise(9, 4), noise(2, 4, 16, 16)

    @torch.compile(fullgraph=True, backend=counter)
    def step(tokens: torch.Tensor, h: int, w: int, next_h: int, next_w: int) -> Any:
        convolution = ScaleConv(phi.weight[0], phi.bias[0], 0.5)
        return _ACCUMULATE(AccumulateCall(feature_map, tokens, codebook, convolution, h, w, next_h, next_w))

    for k in range(1, 9):
        step(torch.zeros(2, VAR_256.lengths[k], dtype=torch.int64), *VAR_256[k], *VAR_256[k + 1])
    assert counter.frame_count <= 2


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"features": noise(2, 4, 7, 5)}, r"features: expected shape \(B, C, 5, 7\), got \(2, 4, 7, 5\)"),
    ({"features": noise(4, 5, 7)}, r"features: expected shape \(B, C, 5, 7\), got \(4, 5, 7\)"),
    (
        {"features": torch.zeros(2, 4, 5, 7, dtype=torch.int64)},
        r"features: expected a floating-point tensor, got torch",
    ),
    ({"codebook": noise(9, 3)}, r"codebook: expected shape \(V, 4\), got \(9, 3\)"),
    ({"codebook": noise(0, 4)}, r"codebook: expected at least one code, got \(0, 4\)"),
    ({"codebook": torch.zeros(9, 4, device="meta")}, r"codebook: expected cpu as features, got meta"),
    ({"schedule": (1, 2)}, r"schedule: expected a ScaleSchedule, got tuple"),
    ({"phi": make_phi(3, 4)}, r"phi\.weight: expected shape \(N, 4, 4, 3, 3\), got \(2, 3, 3, 3, 3\)"),
    ({"phi": make_phi(4, 4)._replace(bias=noise(1, 4))}, r"phi\.bias: expected shape \(2, 4\), got \(1, 4\)"),
    ({"phi": make_phi(4, 3)}, r"phi\.index: expected 4 indices from 0 to 1, got \(0, 0, 1\)"),
    ({"phi": make_phi(4, 4)._replace(index=(0, 0, 1, 2))}, r"phi\.index: expected 4 indices from 0 to 1, got"),
]


@pytest.mark.parametrize(("wrong", "message"), MISTAKES)
def test_mistakes(wrong: dict[str, Any], message: str) -> None:
    arguments = {"features": noise(2, 4, 5, 7), "codebook": noise(9, 4), "schedule": RECTANGLES, **wrong}
    with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
        residual_quantize(**arguments)


STEP_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"scale": 4}, r"scale: expected 0 to 3, got 4"),
    ({"scale": -1}, r"scale: expected 0 to 3, got -1"),
    ({"tokens": torch.zeros(2, 5, dtype=torch.int64)}, r"tokens: expected shape \(2, 6\), got \(2, 5\)"),
    ({"tokens": torch.zeros(2, 6)}, r"tokens: expected int64 or int32, got torch\.float32"),
    ({"feature_map": noise(2, 4, 5, 5)}, r"feature_map: expected shape \(B, C, 5, 7\), got \(2, 4, 5, 5\)"),
    ({"codebook": noise(9, 3)}, r"codebook: expected shape \(V, 4\), got \(9, 3\)"),
    ({"phi": make_phi(4, 5)}, r"phi\.index: expected 4 indices"),
]


@pytest.mark.parametrize(("wrong", "message"), STEP_MISTAKES)
def test_step_mistakes(wrong: dict[str, Any], message: str) -> None:
    arguments = {
        "tokens": torch.zeros(2, 6, dtype=torch.int64),
        "feature_map": noise(2, 4, 5, 7),
        "codebook": noise(9, 4),
        "schedule": RECTANGLES,
        "scale": 1,
        **wrong,
    }
    with pytest.raises(ValueError, match=f"accumulate_scale: {message}"):
        accumulate_scale(**arguments)


def test_index_mistakes() -> None:
    with pytest.raises(ValueError, match="residual_conv_index: num_scales: expected at least 1, got 0"):
        residual_conv_index(0, 4)
    with pytest.raises(ValueError, match="residual_conv_index: num_convs: expected at least 1, got 0"):
        residual_conv_index(4, 0)
