"""The search for nearest codes in Triton: several tiles of rows and parts of the codes, ties, what is not finite."""

from __future__ import annotations

import pytest
import torch
from fastvar.kernels.residual_quantize import impl_triton

from fastvar.ops import accumulate_scale, residual_quantize
from fastvar.schedule import ScaleSchedule
from tests.helpers.replay import replayed
from tests.helpers.samples import noise
from tests.ops.test_residual_quantize import make_phi

SCHEDULE = ScaleSchedule((1, (3, 2), (7, 8)))


@pytest.mark.parametrize(
    ("channels", "size", "znorm"), [(8, 700, False), (12, 300, True), (32, 129, True), (3, 5, False)]
)
def test_nearest_codes(channels: int, size: int, znorm: bool) -> None:
    features, codebook = noise(2, channels, 7, 8), noise(size, channels, seed=1)
    phi = make_phi(channels, len(SCHEDULE))
    found = residual_quantize(features, codebook, SCHEDULE, phi=phi, znorm=znorm, backend="triton")
    excess, rounding, feature_map, inputs = replayed(found.tokens, features, codebook, SCHEDULE, phi, znorm)
    assert bool((excess <= 8 * rounding).all()), float((excess / rounding).max())
    assert int((excess > 0).sum()) <= 2
    torch.testing.assert_close(found.feature_map, feature_map.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.teacher_forcing, inputs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 3, 256])
def test_ties_and_what_is_not_finite(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the codes are divided, the first of equal codes; without any number the first code."""
    monkeypatch.setattr(impl_triton, "PROGRAMS", programs)
    # whole numbers, whose products are exact: the interpreter's differ from column to column
    features, codebook = (4 * noise(3, 3, 3, 6, seed=1)).round(), (4 * noise(5, 3)).round().repeat(100, 1)
    assert residual_quantize(features, codebook, ScaleSchedule(((3, 6),)), backend="triton").tokens.max() < 5
    features[0], features[1, 2], codebook[7, 1] = torch.nan, torch.inf, torch.nan
    schedule = ScaleSchedule((1, (2, 3)))
    for znorm in (False, True):
        tokens = residual_quantize(features[..., :2, :3], codebook, schedule, znorm=znorm, backend="triton").tokens
        assert tokens[0].tolist() == [0] * schedule.num_tokens
        assert tokens.min() >= 0 and tokens.max() < 500


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize(("grids", "batch", "channels", "size"), [((1, (2, 3)), 3, 1, 50), ((2,), 2, 3, 1)])
def test_degenerate_shapes(
    grids: tuple[int | tuple[int, int], ...], batch: int, channels: int, size: int, znorm: bool
) -> None:
    """The reference's tokens, though with one channel all directions of a sign are equally near."""
    schedule = ScaleSchedule(grids)
    features, codebook = noise(batch, channels, *schedule.finest), noise(size, channels, seed=1)
    expected = residual_quantize(features, codebook, schedule, znorm=znorm, backend="reference")
    found = residual_quantize(features, codebook, schedule, znorm=znorm, backend="triton")
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.feature_map, expected.feature_map)


def test_codes_that_do_not_count_are_not_added() -> None:
    """At the finest grid a code that is nothing stays in its cell; a token that does not exist is the first or last."""
    codebook, tokens = noise(7, 3), torch.tensor([[0, 5, 1, 2, 9, -4]])
    codebook[5] = torch.nan
    feature_map, schedule = noise(1, 3, 2, 3), ScaleSchedule((1, (2, 3)))
    found = accumulate_scale(tokens, feature_map, codebook, schedule, 1, backend="triton").feature_map
    expected = feature_map + codebook[tokens.clamp(0, 6)].mT.unflatten(2, (2, 3))
    torch.testing.assert_close(found, expected, equal_nan=True)
