"""The arithmetic of the CUDA kernel of sample_tokens, by threads that stand for the warps of its blocks.

Memory of a block is full of NaN before; a missing sync shows as a result that changes or a token that does not exist.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import distance
from fastvar.kernels.sample_tokens import impl_cuda, reference
from samples import noise

from fastvar.ops import explain
from fastvar.ops._extension import missing
from fastvar.random import uniform

if missing("cpu") is not None:
    pytest.skip(str(missing("cpu")), allow_module_level=True)

explain("sample_bits", torch.zeros(1))  # loads the library
EDGE = 1e-6  # of the total mass: so close to a bound the roundings of float32 decide
SEEDS = torch.tensor([3, -7])


def draw(logits: torch.Tensor, others: torch.Tensor | None, *options: Any) -> tuple[torch.Tensor, ...]:
    """Options are guidance, temperature, top-k, top-p and position."""
    op = torch.ops.fastvar_cpu.sample_tokens_by_teams.default
    return impl_cuda.draw(op, logits, others, SEEDS, *options, True)  # type: ignore[arg-type]


def check(logits: torch.Tensor, others: torch.Tensor | None, *options: Any) -> tuple[torch.Tensor, ...]:
    """The reference's tokens, but for draws at a bound between two, and its scores."""
    guidance, temperature, top_k, top_p, position = options
    got = draw(logits, others, *options)
    expected = reference.forward(logits, others, SEEDS, *options, True)
    same = got[0] == expected[0]
    assert (~same).sum() <= 1
    if not same.all():
        z = reference._guided(logits, others, guidance, temperature)
        threshold = reference._threshold(z, top_k, top_p)
        kept = z.double().masked_fill(z < (-math.inf if threshold is None else threshold), -math.inf)
        counters = torch.arange(position, position + logits.shape[1])
        draws = uniform(SEEDS[:, None], torch.zeros(1, dtype=torch.int64), counters).double()
        assert distance(got[0][~same], draws[~same], kept[~same]).max() < EDGE
    for found, wanted in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(found[same], wanted[same], rtol=0, atol=1e-5)
    return got


SETTINGS = [(0, 1.0), (0, 0.96), (900, 0.96), (900, 1.0), (1, 0.5), (2, 0.5), (30, 0.05), (2000, 1e-9)]


@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("size", [1, 7, 1000, 1024, 2050, 4096, 16384])
def test_tokens(size: int, top_k: int, top_p: float) -> None:
    both = 2 * noise(4, 3, size)
    whole = check(both[:2], both[2:], 1.5, 0.9, top_k, top_p, 5)
    alone = draw(both[:2, 2:], both[2:, 2:], 1.5, 0.9, top_k, top_p, 7)
    assert all(torch.equal(a[:, 0], w[:, 2]) for a, w in zip(alone, whole, strict=True))


def rows(size: int) -> dict[str, torch.Tensor]:
    normal = noise(2, 2, size)
    place = torch.arange(size)
    return {
        "ties": (3 * normal).bfloat16().float(),
        "many ties": normal.round(),
        "equal": torch.full_like(normal, -3.5),
        "far off": 3 * normal - 1000,
        "peaked": normal + 25 * (place == size // 3),
        "two heaps": normal + 10 * (place % 5 == 0),
        "half impossible": torch.where(place % 2 == 0, -math.inf, 3 * normal),
        "one possible": torch.where(place == 1, 0.0, -math.inf).expand_as(normal),
        "long tail": -(normal.abs().log() * 9).abs(),
        "steps": -(2.0 ** -place.clamp_max(120)).expand_as(normal),
        "zeros": torch.where(place % 2 == 0, 0.0, -0.0) * normal.sign().clamp_min(0),
    }


@pytest.mark.parametrize("name", rows(8))
@pytest.mark.parametrize(("top_k", "top_p"), [(900, 1.0), (900, 0.96), (0, 0.96), (2, 0.5), (2000, 0.999)])
def test_what_is_kept(name: str, top_k: int, top_p: float) -> None:
    """Rows that are not normal, or full of ties."""
    check(rows(2050)[name], None, 0.0, 1.0, top_k, top_p, 0)


def test_strides() -> None:
    both = noise(3, 300, 4).transpose(1, 2)
    options = (1.5, 1.0, 90, 0.9, 0)
    plain = draw(both[:2].contiguous(), both[1:].contiguous(), *options)
    for logits, others in [(both[:2], both[1:]), (both[:2].contiguous(), both[1:])]:
        assert all(torch.equal(a, b) for a, b in zip(draw(logits, others, *options), plain, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_make_no_sense_end(bad: float) -> None:
    """Some token, not finite log-probabilities."""
    logits = noise(2, 2, 1500)
    logits[0, 0, 1400:] = bad
    logits[:, 1] = bad
    tokens, _, sampled = draw(logits, None, 0.0, 1.0, 20, 0.9, 0)
    assert ((tokens >= 0) & (tokens < 1500)).all()
    assert not sampled[:, 1].isfinite().any() and sampled[1, 0].isfinite()
    assert bool(sampled[0, 0].isfinite()) == (bad == -math.inf)
