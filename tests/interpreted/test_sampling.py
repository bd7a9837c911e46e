"""The sampler and the masks in Triton: random numbers, what top-k and top-p keep, draws, footprints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastvar.kernels.common.philox import uniform as philox_uniform
from fastvar.kernels.propagate_mask import impl_triton as masks
from fastvar.kernels.propagate_mask import reference as mask_reference
from fastvar.kernels.sample_tokens import impl_triton as sampler
from fastvar.kernels.sample_tokens import reference

from fastvar.ops import propagate_mask, sample_bits, sample_tokens
from fastvar.random import uniform
from fastvar.schedule import PRESETS, VAR_256, ScaleSchedule
from tests.helpers.draws import check_banned_tokens, distance
from tests.helpers.samples import noise
from tests.interpreted.test_kernels import check

EDGE = 1e-6  # of the total mass: so close to a bound the roundings of float32 decide


@triton.jit
def _numbers(seeds_ptr, streams_ptr, counters_ptr, out_ptr, N: tl.constexpr):
    row = tl.arange(0, N)
    seed, stream = tl.load(seeds_ptr + row)[:, None], tl.load(streams_ptr + row)[:, None]
    counter = tl.load(counters_ptr + row)[None, :]
    tl.store(out_ptr + row[:, None] * N + row[None, :], philox_uniform(seed, stream, counter))


def test_random_numbers_are_those_of_fastvar_random() -> None:
    numbers = torch.tensor([0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1, 123456789012345])
    out = torch.zeros(8, 8)
    _numbers[(1,)](numbers, numbers.flip(0), numbers, out, 8)
    assert torch.equal(out, uniform(numbers[:, None], numbers.flip(0)[:, None], numbers))


@triton.jit
def _keep(z_ptr, kept_ptr, k, rest, V: tl.constexpr, N: tl.constexpr, FEW: tl.constexpr, SHARE: tl.constexpr):
    place = tl.arange(0, N)
    z = tl.load(z_ptr + place, place < V, float("-inf"))
    weights, bound = sampler._kept(z, tl.max(z), k, rest, False, FEW, SHARE)
    tl.store(kept_ptr + place, (z >= bound) & (weights > 0), place < V)


def kept(z: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Which logits (V,) are kept."""
    out = torch.zeros(z.shape, dtype=torch.bool)
    block = triton.next_power_of_2(len(z))
    _keep[(1,)](z, out, top_k, 1 - top_p, V=len(z), N=block, FEW=0 < top_k < len(z), SHARE=0 < top_p < 1)
    return out


def rows(size: int) -> dict[str, torch.Tensor]:
    normal = noise(size)
    mixed = 2.5 * noise(size, seed=1) - 1.5 * noise(size, seed=2)
    return {
        "narrow": normal,
        "mixed": mixed,
        "ties": (3 * normal).bfloat16().float(),
        "many ties": normal.round(),
        "equal": torch.full((size,), -3.5),
        "far off": 3 * normal - 1000,
        "peaked": normal + 25 * (torch.arange(size) == size // 3),
        "half impossible": torch.where(torch.arange(size) % 2 == 0, -math.inf, mixed),
        "one possible": torch.where(torch.arange(size) == 1, 0.0, -math.inf),
        "long tail": -(noise(size).abs().log() * 9).abs(),
        "steps": -(2.0 ** -torch.arange(size).clamp_max(120)).float(),
        "zeros": torch.where(torch.arange(size) % 2 == 0, 0.0, -0.0) * normal.sign().clamp_min(0),
    }


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 1.0), (900, 0.96), (0, 0.96), (0, 1e-9), (2, 0.5), (4095, 0.999)])
@pytest.mark.parametrize("size", [4096, 1000])
def test_sets_are_those_of_the_reference(size: int, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k exactly; top-p but for tokens whose mass is within roundings of 1 - p. And the search is short."""
    sums: list[int] = []
    below = sampler._below

    def counted(*arguments: Any) -> Any:
        sums[-1] += 1
        return below(*arguments)

    monkeypatch.setattr(sampler, "_below", counted)
    top_k = top_k * size // 4096
    differences = 0
    for name, z in rows(size).items():
        sums.append(0)
        got = kept(z, top_k, top_p)
        threshold = reference._threshold(z[None], top_k, top_p)
        # weights of less than a normal number are nothing
        expected = (z >= (-math.inf if threshold is None else threshold[0])) & (z >= z.max() - sampler.DEPTH.value)
        if not torch.equal(got, expected):
            differences += 1
            wrong = got != expected
            assert 0 < top_p < 1 and (z[wrong] == z[wrong][0]).all(), name
            few = (z >= z.topk(top_k).values[-1]) if 0 < top_k < size else torch.ones_like(wrong)
            mass = (z.double() - z.max()).exp() * few
            assert abs(mass[z <= z[wrong][0]].sum() / mass.sum() - (1 - top_p)) < EDGE, name
    assert differences <= 1
    assert max(sums) <= 70 and sum(sums) <= 26 * len(sums)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 0.7), (30, 0.4)])
def test_draws(top_k: int, top_p: float) -> None:
    """Those of the reference, and distributed as specified: chi-squared over 40 fixed draws, as there."""
    row = (noise(20, seed=3) * 4).round() / 2
    logits = row.expand(5, 8, 20)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seeds": torch.arange(5), "position": 3}
    got = sample_tokens(logits, log_probs=True, backend="triton", **options)
    wanted = sample_tokens(logits, log_probs=True, backend="reference", **options)
    assert torch.equal(got.tokens, wanted.tokens)
    for found, expected in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    threshold = reference._threshold(row.double()[None], top_k, top_p)
    lost = row < (-math.inf if threshold is None else threshold[0])
    share = 40 * row.double().masked_fill(lost, -math.inf).softmax(-1)
    counts = torch.bincount(got.tokens.flatten(), minlength=20)
    assert not counts[lost].any()
    statistic = float(((counts - share) ** 2 / share)[~lost].sum())
    freedom = int((~lost).sum()) - 1
    assert statistic <= freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("size", "options"), [(4096, {"top_k": 900, "top_p": 0.96}), (1000, {}), (2050, {"top_p": 0.9})]
)
def test_tokens_of_large_vocabularies(size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """The reference's but for draws at a bound between two tokens, and the same ones in any batch."""
    both = noise(4, 6, size, dtype=dtype) * 2
    arguments = {"unconditional": both[2:], "guidance": 1.5, "temperature": 0.9, "log_probs": True, **options}
    seeds = torch.tensor([3, -7])
    got = sample_tokens(both[:2], seeds=seeds, backend="triton", **arguments)
    expected = sample_tokens(both[:2], seeds=seeds, backend="reference", **arguments)
    same = got.tokens == expected.tokens
    if not same.all():
        z = reference._guided(both[:2].float(), both[2:].float(), 1.5, 0.9)[~same]
        threshold = reference._threshold(z, options.get("top_k", 0), options.get("top_p", 1.0))
        z = z.double().masked_fill(z < (-math.inf if threshold is None else threshold), -math.inf)
        draws = uniform(seeds[:, None], torch.zeros(1, dtype=torch.int64), torch.arange(6))[~same].double()
        assert distance(got.tokens[~same], draws, z).max() < EDGE
    assert (~same).sum() <= 1
    for found, wanted in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(found[same], wanted[same], rtol=0, atol=5e-6)
    arguments["unconditional"] = both[3:, 4:]
    alone = sample_tokens(both[1:2, 4:], seeds=seeds[1:], position=4, backend="triton", **arguments)
    assert all(torch.equal(a[0], g[1, 4:]) for a, g in zip(alone, got, strict=True))


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24])
def test_extreme_draws_stay_in_the_set(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, stream, counter: tl.full((), draw, tl.float32))
    logits = noise(1, 3, 1000) * 4
    for top_k, top_p in [(0, 1.0), (100, 0.9), (1, 1.0)]:
        options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seeds": torch.arange(1), "log_probs": True}
        result = sample_tokens(logits, backend="triton", **options)
        assert torch.isfinite(result.sampled_log_probs).all()
        threshold = reference._threshold(logits[0], top_k, top_p)
        inside = logits[0] >= (-math.inf if threshold is None else threshold)
        assert inside.gather(-1, result.tokens[0][:, None]).all()
        if draw == 0:
            assert torch.equal(result.tokens[0], inside.int().argmax(-1))


def test_banned_tokens_are_not_drawn() -> None:
    check_banned_tokens("triton")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_make_no_sense_end(bad: float) -> None:
    """As the reference on a GPU, which cannot raise without waiting: some token, not finite log-probabilities."""
    logits = noise(1, 2, 70)
    logits[0, 0, 60:] = bad
    logits[0, 1] = bad
    result = sample_tokens(logits, top_k=20, top_p=0.9, seeds=torch.arange(1), log_probs=True, backend="triton")
    assert ((result.tokens >= 0) & (result.tokens < 70)).all()
    assert not result.sampled_log_probs[0, 1].isfinite()
    assert bool(result.sampled_log_probs[0, 0].isfinite()) == (bad == -math.inf)


def test_nan_after_the_first_block() -> None:
    """It is not as if the row ended there."""
    logits = noise(1, 3, 1000)
    logits[..., 900] = math.nan
    result = sample_tokens(logits, seeds=torch.arange(1), log_probs=True, backend="triton")
    assert not result.sampled_log_probs.isfinite().any() and not result.log_probs.isfinite().any()


def test_bits_over_several_programs() -> None:
    arguments = {"unconditional": noise(3, 50, 33, seed=1), "guidance": 1.5, "temperature": 0.5, "log_probs": True}
    for options in ({"top_p": 0.97}, {"top_k": 1}, {}):
        seeds = torch.tensor([2**40, -1, 5])
        check(sample_bits, {"logits": noise(3, 50, 33), "seeds": seeds, "position": 9, **arguments, **options}, ())


@pytest.mark.parametrize("footprint", ["area", "support"])
def test_footprints_of_every_preset(footprint: str) -> None:
    schedules = [*PRESETS.values(), ScaleSchedule((1, (2, 3), (2, 5), (5, 7), (5, 7)))]
    sides = {pair for s in schedules for h, w in s for pair in ((h, s.finest[0]), (w, s.finest[1]))}
    for coarse, fine in sides:
        cells = torch.arange(fine)
        bounds = torch.tensor([masks._interval(i, coarse, fine, footprint) for i in range(coarse)])
        inside = (cells >= bounds[:, :1]) & (cells < bounds[:, 1:])
        assert torch.equal(inside.float(), mask_reference._footprints(coarse, fine, footprint, torch.device("cpu")))
    for schedule in (schedules[-1], VAR_256):
        top, left, height, width = masks.footprints(schedule, footprint, torch.device("cpu"))
        token = 0
        for h, w in schedule:
            for i in range(h):
                for j in range(w):
                    across = left[token], left[token] + width[token]
                    assert (top[token], top[token] + height[token]) == masks._interval(
                        i, h, schedule.finest[0], footprint
                    )
                    assert across == masks._interval(j, w, schedule.finest[1], footprint)
                    token += 1
        assert token == len(top)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("footprint", ["area", "support"])
def test_masks(footprint: str, soft: bool) -> None:
    """A footprint of the coarsest scale takes several steps."""
    schedule = ScaleSchedule((1, (3, 2), (4, 7), (14, 20)))
    mask = noise(2, 20, 14).mT
    arguments = {"schedule": schedule, "footprint": footprint, "soft": soft}
    check(propagate_mask, {"mask": (mask - 1.5).clamp(0, 1), **arguments}, ())
    check(propagate_mask, {"mask": mask[:1] > 2, **arguments}, ())


def test_larger_rows_are_refused() -> None:
    with pytest.raises(RuntimeError, match="up to 32768 elements along the last dimension, the tensor has 32769"):
        sample_tokens(torch.zeros(1, 1, 32769), seeds=torch.zeros(1, dtype=torch.int64), backend="triton")
