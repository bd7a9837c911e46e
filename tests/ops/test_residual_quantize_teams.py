"""The arithmetic of the CUDA kernels of residual_quantize and accumulate_scale, by threads that stand for their blocks.

Memory of a block is full of NaN before; a missing sync shows as a result that depends on the number of threads.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastvar.ops import QuantizedResidual, ResidualConv, accumulate_scale, explain, residual_quantize
from fastvar.ops._extension import missing
from fastvar.schedule import VAR_256, ScaleSchedule
from tests.helpers.replay import replayed
from tests.helpers.samples import noise
from tests.ops.test_residual_quantize import make_phi

if missing("cpu") is not None:
    pytest.skip(str(missing("cpu")), allow_module_level=True)


explain("residual_quantize", torch.zeros(1))  # loads the library
RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7)))
UNEVEN = ScaleSchedule(((3, 1), (6, 9), (6, 9)))


def quantize(
    features: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule, phi: ResidualConv | None, znorm: bool,
    *, members: int, parts: int = 1, rows: int = 0, lines: int = 0,
) -> QuantizedResidual:  # fmt: skip
    batch, channels = features.shape[:2]
    tokens = torch.full((batch, schedule.num_tokens), -1)
    feature_map = torch.full_like(features, torch.nan)
    inputs = torch.full((batch, schedule.num_tokens - schedule.lengths[0], channels), torch.nan)
    usage = torch.zeros(len(codebook), dtype=torch.int64)
    convs = (None, None, 0.0, [0] * len(schedule))
    if phi is not None:
        convs = (phi.weight, phi.bias, phi.ratio, list(phi.index))
    torch.ops.fastvar_cpu.residual_quantize_by_teams(
        features, codebook, *convs, schedule.flat, znorm, members, parts, rows,
        lines or schedule.finest[0], tokens, feature_map, inputs, usage,
    )  # fmt: skip
    return QuantizedResidual(tokens, feature_map, inputs, usage)


LAUNCHES = [
    {"members": 1},
    {"members": 5},
    {"members": 32},
    {"members": 4, "parts": 2},
    {"members": 3, "parts": 5},
    {"members": 7, "lines": 2},
    {"members": 5, "parts": 3, "lines": 1},
    {"members": 1, "rows": 16, "lines": 1},
    {"members": 6, "rows": 16, "lines": 2},
    {"members": 33, "rows": 64, "lines": 4},
]
CASES = [(RECTANGLES, 12, 50, 2), (RECTANGLES, 3, 5, 0), (UNEVEN, 16, 1029, 3), (ScaleSchedule((1, 1)), 8, 1, 1)]


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("schedule", "channels", "size", "convs"), CASES)
def test_all_scales(schedule: ScaleSchedule, channels: int, size: int, convs: int, znorm: bool) -> None:
    for launch in LAUNCHES:
        features, codebook = noise(2, channels, *schedule.finest), noise(size, channels, seed=1)
        phi = make_phi(channels, len(schedule), convs) if convs else None
        tokens, feature_map, inputs, usage = quantize(features, codebook, schedule, phi, znorm, **launch)
        assert torch.equal(usage, tokens.flatten().bincount(minlength=size))
        excess, rounding, exact_map, exact_inputs = replayed(tokens, features, codebook, schedule, phi, znorm)
        assert bool((excess <= 8 * rounding).all()), float((excess / rounding).max())
        torch.testing.assert_close(feature_map, exact_map.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs, exact_inputs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", range(2, 9))
def test_parts_with_fewer_channels(parts: int) -> None:
    """The weights of the last block's few filters lie where those of a full block do: laid out for themselves they may
    take more memory than there is."""
    schedule = ScaleSchedule((1, 2, 4))
    for channels in (5, 9, 31, 57, 73, 97, 100, 121, 130, 201):
        features, codebook = noise(1, channels, 4, 4), noise(40, channels, seed=1)
        phi = make_phi(channels, len(schedule), 2)
        alone = quantize(features, codebook, schedule, phi, False, members=16)
        found = quantize(features, codebook, schedule, phi, False, members=4, parts=parts, lines=3)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)), channels


@pytest.mark.parametrize(("channels", "filters"), [(12, 8), (100, 13), (97, 33)])
def test_steps_with_fewer_filters_in_the_last_block(channels: int, filters: int) -> None:
    schedule = ScaleSchedule((2, 4))
    phi, codebook = make_phi(channels, 2, 2), noise(9, channels, seed=1)
    feature_map, tokens = noise(1, channels, 4, 4), torch.arange(4)[None]
    accumulated, inputs = torch.full_like(feature_map, torch.nan), torch.empty(1, 16, channels)
    torch.ops.fastvar_cpu.accumulate_scale_by_teams(
        feature_map, tokens, codebook, phi.weight[0], phi.bias[0], phi.ratio, 2, 2, 4, 4, 6, filters, 3, accumulated,
        inputs,
    )  # fmt: skip
    expected = accumulate_scale(tokens, feature_map.double(), codebook.double(), schedule, 0, phi=phi)
    torch.testing.assert_close(accumulated, expected.feature_map.float(), rtol=1e-5, atol=1e-5)


def test_the_launch_does_not_matter() -> None:
    """Bit for bit, over the scales of VAR with several tiles of codes and passes of rows."""
    features, codebook, phi = noise(1, 16, 16, 16), noise(700, 16, seed=1), make_phi(16, 10, 4)
    first, *others = [
        quantize(features, codebook, VAR_256, phi, False, **launch)
        for launch in (
            {"members": 2},
            {"members": 64},
            {"members": 8, "parts": 4},
            {"members": 8, "parts": 8, "lines": 3},
            {"members": 8, "rows": 64, "lines": 4},
        )
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_first_of_equal_codes_and_what_is_not_finite() -> None:
    codebook, features = noise(5, 3).repeat(700, 1), noise(2, 3, 4, 4, seed=1)
    schedule = ScaleSchedule((1, 2, 4))
    for launch in LAUNCHES:
        assert quantize(features, codebook, schedule, None, False, **launch)[0].max() < 5
        broken = features.clone()
        broken[0], broken[1, :, 2] = torch.nan, torch.inf
        tokens = quantize(broken, codebook, schedule, None, True, **launch)[0]
        assert tokens[0].tolist() == [0] * 21
        assert tokens.min() >= 0 and tokens.max() < len(codebook)


def chain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of a b over the last dimension, from its first element to its last, each rounded to float32."""
    total = torch.zeros(1)
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        total = total + x * y
    return total


def nearest(rows: torch.Tensor, codebook: torch.Tensor, znorm: bool) -> torch.Tensor:
    """The first of the smallest distances in float32, which the search promises: rows (N, C), codes (V, C)."""
    if znorm:
        rows, codebook = (t / chain(t, t).sqrt()[:, None].clamp(min=1e-12) for t in (rows, codebook))
        return chain(-rows[:, None], codebook).argmin(1)
    return (chain(-2 * rows[:, None], codebook) + chain(codebook, codebook)).argmin(1)


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(32, 500), (5, 777), (40, 96), (1, 33)])
def test_the_screen_changes_nothing(channels: int, size: int, znorm: bool) -> None:
    # the spread of the codes about some points: most are alike in bfloat16
    for scale, spread in product((1e-3, 1, 1e6), (1e-4, 1e-2, 1)):
        points, features = noise(9, channels), scale * noise(2, channels, 6, 7, seed=1)
        codebook = scale * (points[torch.arange(size) % 9] + spread * noise(size, channels, seed=2))
        expected = nearest(features.flatten(2).mT.flatten(0, 1), codebook, znorm).view(2, -1)
        for launch in ({"members": 3}, {"members": 2, "parts": 4}, {"members": 5, "rows": 16, "lines": 3}):
            found = quantize(features, codebook, ScaleSchedule(((6, 7),)), None, znorm, **launch)
            assert torch.equal(found.tokens, expected)


DEGENERATE = [  # schedule, batch, channels, codes
    (RECTANGLES, 3, 1, 50),
    (RECTANGLES, 2, 3, 1),
    (RECTANGLES, 0, 3, 5),
    (ScaleSchedule((1,)), 2, 1, 1),
    (ScaleSchedule((1, 1)), 2, 4, 7),
]


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("schedule", "batch", "channels", "size"), DEGENERATE)
def test_degenerate_shapes(schedule: ScaleSchedule, batch: int, channels: int, size: int, znorm: bool) -> None:
    """All ways find the same codes, though with one channel all directions of a sign are equally near."""
    features, codebook = noise(batch, channels, *schedule.finest), noise(size, channels, seed=1)
    expected = residual_quantize(features, codebook, schedule, znorm=znorm, backend="reference")
    on_cpu = residual_quantize(features, codebook, schedule, znorm=znorm, backend="cpu")
    assert torch.equal(on_cpu.tokens, expected.tokens)
    for launch in LAUNCHES:
        found = quantize(features, codebook, schedule, None, znorm, **launch)
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.feature_map, expected.feature_map)


def test_rows_of_nothing() -> None:
    """Of zeros all cosines are 0 and the shortest code is the nearest; codes that are not finite are never taken."""
    codebook = noise(300, 4) + 1
    codebook[0], codebook[17], codebook[5, 2] = torch.nan, 0.5 * codebook[17], torch.inf
    features = torch.zeros(1, 4, 3, 3)
    shortest = int(chain(codebook, codebook).nan_to_num(torch.inf).argmin())
    for launch in LAUNCHES:
        assert set(quantize(features, codebook, ScaleSchedule((3,)), None, True, **launch).tokens[0].tolist()) == {1}
        found = quantize(features, codebook, ScaleSchedule((3,)), None, False, **launch).tokens
        assert set(found[0].tolist()) == {shortest}


@pytest.mark.parametrize("with_phi", [False, True])
@pytest.mark.parametrize(("members", "filters", "lines"), [(1, 16, 5), (7, 8, 2), (33, 4, 3), (16, 8, 16)])
def test_steps(members: int, filters: int, lines: int, with_phi: bool) -> None:
    for scale in range(4):
        schedule, channels = RECTANGLES, 12
        phi = make_phi(channels, len(schedule), len(schedule)) if with_phi else None
        feature_map, codebook = noise(3, channels, 5, 7), noise(9, channels, seed=1)
        tokens = torch.arange(3 * schedule.lengths[scale]).view(3, -1) % 9
        accumulated = torch.full_like(feature_map, torch.nan)
        following = schedule[scale + 1] if scale < 3 else (0, 0)
        inputs = torch.full((3, following[0] * following[1], channels), torch.nan)
        convs = (None, None, 0.0)
        if phi is not None:
            convs = (phi.weight[phi.index[scale]], phi.bias[phi.index[scale]], phi.ratio)
        torch.ops.fastvar_cpu.accumulate_scale_by_teams(
            feature_map,
            tokens,
            codebook,
            *convs,
            *schedule[scale],
            *following,
            members,
            filters,
            lines,
            accumulated,
            inputs,
        )
        expected = accumulate_scale(tokens, feature_map.double(), codebook.double(), schedule, scale, phi=phi)
        torch.testing.assert_close(accumulated, expected.feature_map.float(), rtol=1e-5, atol=1e-5)
        if expected.next_input is not None:
            torch.testing.assert_close(inputs, expected.next_input.float(), rtol=1e-5, atol=1e-5)
