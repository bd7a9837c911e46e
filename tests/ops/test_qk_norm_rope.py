"""qk_norm_rope, its variant that writes the cache, and Infinity's rotary tables, against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops import qk_norm_rope, qk_norm_rope_into_cache, rope_tables
from fastvar.schedule import ScaleSchedule, infinity_schedule
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

RECTANGLES = ScaleSchedule((1, (2, 3), (3, 5)))
HEADS, DIM = 3, 8
LOG_SCALE = torch.tensor([math.log(4.0), -1.0, 7.0])  # the last one is above log 100


def projections(dtype: torch.dtype = torch.float64, batch: int = 2, dim: int = DIM) -> tuple[torch.Tensor, ...]:
    """q, k and v of the rectangles as slices of one projection."""
    return noise(batch, RECTANGLES.num_tokens, 3, HEADS, dim, dtype=dtype).unbind(2)


def rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The pairs (x_2i, x_2i+1) as complex numbers, turned by the tables' angles."""
    if rope is None:
        return x
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*rope)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def defined(
    q: torch.Tensor, k: torch.Tensor, log_scale: torch.Tensor | None, rope: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = q.double(), k.double()
    if rope is not None:
        rope = tuple(table.double() for table in rope)
    if log_scale is not None:
        scale = torch.stack([s.exp() if s < math.log(100) else s.new_tensor(100) for s in log_scale.double()])
        q = q / q.square().sum(-1, keepdim=True).sqrt() * scale[:, None]
        k = k / k.square().sum(-1, keepdim=True).sqrt()
    return rotated(q, rope), rotated(k, rope)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("turn", [True, False])
def test_definition(norm: bool, turn: bool) -> None:
    q, k, _ = projections()
    log_scale = LOG_SCALE if norm else None
    rope = rope_tables(RECTANGLES, DIM) if turn else None
    for got, expected in zip(
        qk_norm_rope(q, k, log_scale=log_scale, rope=rope), defined(q, k, log_scale, rope), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype: torch.dtype) -> None:
    q, k, _ = projections(dtype, dim=64)
    cos, sin = rope_tables(RECTANGLES, 64)
    scale = LOG_SCALE.clamp(max=math.log(100)).exp()[:, None].to(dtype)
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2).to(dtype)  # [L, D/2, 2, 2]

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lpij,blhpj->blhpi", turn, x.unflatten(-1, (-1, 2))).flatten(-2)

    expected = defined(q, k, LOG_SCALE, (cos, sin))
    got = qk_norm_rope(q, k, log_scale=LOG_SCALE, rope=(cos, sin))
    assert_as_accurate(got[0], plain(F.normalize(q, dim=-1) * scale), expected[0])
    assert_as_accurate(got[1], plain(F.normalize(k, dim=-1)), expected[1])


def test_gradient_of_the_scale_is_cut_above_its_maximum() -> None:
    q, k, _ = projections()
    log_scale = LOG_SCALE.double().requires_grad_()
    out, _ = qk_norm_rope(q, k, log_scale=log_scale)
    weight = noise(*q.shape, dtype=torch.float64, seed=1)
    (out * weight).sum().backward()
    # d/ds (q exp(s)) = q exp(s)
    expected = (out * weight).sum((0, 1, 3)).detach()
    assert expected[2].abs() > 1
    torch.testing.assert_close(log_scale.grad, expected * torch.tensor([1.0, 1.0, 0.0]).double())


def test_zero_vectors() -> None:
    """They stay zero, and so are finite gradients and the other vectors."""
    q, k, _ = (x.clone() for x in projections(torch.float32))
    expected = qk_norm_rope(q, k, log_scale=LOG_SCALE)
    q[0, 3, 1] = 0
    k[1, 0, 2] = 0
    q.requires_grad_(), k.requires_grad_()
    got = qk_norm_rope(q, k, log_scale=LOG_SCALE)
    assert torch.equal(got[0][0, 3, 1], torch.zeros(DIM)) and torch.equal(got[1][1, 0, 2], torch.zeros(DIM))
    assert torch.equal(got[0][1], expected[0][1]) and torch.equal(got[1][0], expected[1][0])
    (got[0].sum() + got[1].sum()).backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()


@pytest.mark.parametrize("ratio", ["1.000", "1.250", "0.666", "2.500", "0.333"])
def test_tables_of_infinity(ratio: str) -> None:
    """The positions of the smallest budget on the grid of the largest, rounding halves to even."""
    schedule, (height, width) = infinity_schedule("0.06M", ratio), infinity_schedule("1M", ratio).finest
    dim, half = 32, 16
    angles = []
    for h, w in schedule:
        for i in range(h):
            for j in range(w):
                row, column = round(Fraction(i * height, h)), round(Fraction(j * width, w))
                frequencies = [10000 ** (-n / half) for n in range(0, half, 2)]
                angles.append([row * f for f in frequencies] + [column * f for f in frequencies])
    angle = torch.tensor(angles, dtype=torch.float64)
    cos, sin = rope_tables(schedule, dim, finest=(height, width))
    assert cos.shape == sin.shape == (schedule.num_tokens, dim // 2) and cos.dtype == torch.float32
    # float32 angles of up to 111 radians are off by some 1e-5
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=5e-5)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=5e-5)


def test_halves_round_to_even() -> None:
    # two rows on a grid of five stand at 0 and 2.5: the even 2
    _, sin = rope_tables(ScaleSchedule(((2, 1),)), 4, finest=(5, 1))
    torch.testing.assert_close(sin[:, 0], torch.tensor([0, 2.0]).sin())
    _, sin = rope_tables(ScaleSchedule(((2, 1),)), 4, finest=(7, 1))
    torch.testing.assert_close(sin[:, 0], torch.tensor([0, 4.0]).sin())


def test_the_finest_grid_is_the_default() -> None:
    for got, expected in zip(
        rope_tables(RECTANGLES, DIM), rope_tables(RECTANGLES, DIM, finest=RECTANGLES.finest), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("log_scale", [LOG_SCALE, None])
def test_into_cache(log_scale: torch.Tensor | None) -> None:
    """The same queries; keys and values in their rows of a strided cache and nowhere else."""
    q, k, v = projections(torch.float32)
    length, position = q.shape[1], 4
    rope = rope_tables(RECTANGLES, DIM)
    memory = torch.full((2, 40, 2, HEADS, DIM), torch.nan)
    keys, values = memory[:, :, 0], memory[:, :, 1]
    got = qk_norm_rope_into_cache(q, k, v, keys, values, position, log_scale=log_scale, rope=rope)
    expected = qk_norm_rope(q, k, log_scale=log_scale, rope=rope)
    assert torch.equal(got, expected[0])
    assert torch.equal(keys[:, position : position + length], expected[1])
    assert torch.equal(values[:, position : position + length], v)
    for cache in (keys, values):
        assert cache[:, :position].isnan().all() and cache[:, position + length :].isnan().all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q: expected shape", {"q": torch.zeros(2, 22, 24)}),
        ("q: expected a floating-point", {"q": torch.zeros(2, 22, HEADS, DIM, dtype=torch.int64)}),
        ("k: expected shape", {"k": torch.zeros(2, 22, HEADS, 4)}),
        ("k: expected torch.float32", {"k": torch.zeros(2, 22, HEADS, DIM, dtype=torch.float64)}),
        ("log_scale: expected shape", {"log_scale": torch.zeros(DIM)}),
        ("log_scale: expected a floating-point", {"log_scale": torch.zeros(HEADS, dtype=torch.int64)}),
        ("log_scale: expected cpu", {"log_scale": torch.zeros(HEADS, device="meta")}),
        ("rope cos: expected shape", {"rope": (torch.zeros(22, DIM), torch.zeros(22, 4))}),
        ("rope sin: expected shape", {"rope": (torch.zeros(22, 4), torch.zeros(21, 4))}),
        ("rope sin: expected cpu", {"rope": (torch.zeros(22, 4), torch.zeros(22, 4, device="meta"))}),
    ],
)
def test_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    q, k, v = projections(torch.float32)
    cache = torch.zeros(2, 22, HEADS, DIM)
    with pytest.raises(ValueError, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(**{"q": q, "k": k, **change})
    with pytest.raises(ValueError, match=f"^qk_norm_rope_into_cache: {message}"):
        arguments = {"q": q, "k": k, "v": v, "key_cache": cache, "value_cache": cache.clone(), "position": 0}
        qk_norm_rope_into_cache(**{**arguments, **change})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("v: expected shape", {"v": torch.zeros(2, 21, HEADS, DIM)}),
        ("key_cache: expected shape", {"key_cache": torch.zeros(1, 30, HEADS, DIM)}),
        ("value_cache: expected shape", {"value_cache": torch.zeros(2, 29, HEADS, DIM)}),
        ("key_cache: expected torch.float32", {"key_cache": torch.zeros(2, 30, HEADS, DIM).double()}),
        ("position: expected 0 to 8, got 9", {"position": 9}),
        ("position: expected 0 to 8, got -1", {"position": -1}),
    ],
)
def test_wrong_cache(message: str, change: dict[str, Any]) -> None:
    q, k, v = projections(torch.float32)
    cache = torch.zeros(2, 30, HEADS, DIM)
    arguments = {"q": q, "k": k, "v": v, "key_cache": cache, "value_cache": cache.clone(), "position": 0}
    with pytest.raises(ValueError, match=f"^qk_norm_rope_into_cache: {message}"):
        qk_norm_rope_into_cache(**{**arguments, **change})


def test_wrong_head_dimensions() -> None:
    with pytest.raises(ValueError, match="rope_tables: head_dim: expected a multiple of 4, got 6"):
        rope_tables(RECTANGLES, 6)
    with pytest.raises(ValueError, match="qk_norm_rope: q: expected an even head dimension"):
        qk_norm_rope(*projections(dim=7)[:2], rope=(torch.zeros(22, 3), torch.zeros(22, 3)))
