"""sample_tokens and sample_bits against sort-based specifications in float64 and against their distributions."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastvar.ops import sample_bits, sample_tokens
from fastvar.random import uniform
from tests.helpers.draws import check_banned_tokens
from tests.helpers.samples import noise


def specification(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities of one row (V,) after top-k and top-p, by sorting, in float64."""
    z = logits.double().tolist()
    kept = list(range(len(z)))
    if 0 < top_k < len(z):
        kth = sorted(z, reverse=True)[top_k - 1]
        kept = [i for i in kept if z[i] >= kth]
    if 0 < top_p < 1:
        mass = {i: math.exp(z[i] - max(z)) for i in kept}
        below = {i: sum(mass[j] for j in kept if z[j] <= z[i]) for i in kept}
        limit = (1 - top_p) * sum(mass.values())
        kept = [i for i in kept if below[i] > limit or z[i] == max(z)]
    out = torch.full((len(z),), -math.inf, dtype=torch.float64)
    out[kept] = torch.tensor([z[i] for i in kept], dtype=torch.float64)
    return out.softmax(-1)


def upstream_filter(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """VAR's filter, a whole sort per row: the logits (n, V) with minus infinity where they are dropped."""
    logits = logits.clone()
    if top_k > 0:
        smallest = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits[logits < smallest] = -math.inf
    if top_p > 0:
        values, index = logits.sort(-1)
        drop = values.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1:] = False
        logits[drop.scatter(-1, index, drop)] = -math.inf
    return logits


SETTINGS = [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.6), (0, 0.96), (6, 0.7), (6, 0.0), (30, 0.05), (2, 0.5), (1, 0.5)]


@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("step", [0.0, 0.5, 2.0])
def test_distribution_is_the_specified_one(top_k: int, top_p: float, step: float) -> None:
    """Only kept tokens are drawn, with the specified probabilities; logits rounded to a step are full of ties."""
    row = noise(20, dtype=torch.float64, seed=3) * 2
    row = (row / step).round() * step if step else row
    expected = specification(row, top_k, top_p)
    logits = row.expand(50, 40, 20)
    result = sample_tokens(logits, top_k=top_k, top_p=top_p, seeds=torch.arange(50), log_probs=True)
    torch.testing.assert_close(result.sampled_log_probs, expected.log()[result.tokens], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.log_probs, row.log_softmax(-1)[result.tokens], rtol=1e-10, atol=1e-10)
    # Chi-squared with 2000 fixed draws; 4.5 standard deviations above the mean is beyond the 1e-4 quantile.
    kept = expected > 0
    counts = torch.bincount(result.tokens.flatten(), minlength=20)[kept]
    wanted = 2000 * expected[kept]
    freedom = int(kept.sum()) - 1
    statistic = float(((counts - wanted) ** 2 / wanted).sum())
    assert statistic <= freedom + 4.5 * math.sqrt(2 * freedom) + 1e-6


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.96), (900, 0.0), (0, 0.96), (50, 0.5)])
def test_same_set_as_upstream(top_k: int, top_p: float) -> None:
    """On VAR's vocabulary: the mass of the set is upstream's, up to tokens that rounding may decide."""
    logits = noise(1, 16, 4096, dtype=torch.float64) * 3
    kept = upstream_filter(logits[0], top_k, top_p).log_softmax(-1)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        result = sample_tokens(logits.to(dtype), top_k=top_k, top_p=top_p, seeds=torch.tensor([4]), log_probs=True)
        expected = kept.gather(-1, result.tokens[0][:, None])[:, 0]
        torch.testing.assert_close(result.sampled_log_probs[0].double(), expected, rtol=0, atol=tolerance)


def test_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = noise(3, 11, 50, dtype=torch.float64)
    seeds = torch.tensor([7, -1, 2**40])
    got = sample_tokens(logits, seeds=seeds, position=3).tokens
    draw = uniform(seeds[:, None], torch.zeros(1, dtype=torch.int64), torch.arange(3, 14)).double()
    sums = logits.softmax(-1).cumsum(-1)
    assert torch.equal(got, (sums <= draw[..., None]).sum(-1))


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24])
def test_extreme_draws_stay_in_the_set(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:

    def constant(seed: torch.Tensor, stream: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        return torch.full(torch.broadcast_shapes(seed.shape, counter.shape), draw)

    for name in ("reference", "impl_torch"):
        monkeypatch.setattr(importlib.import_module(f"fastvar.kernels.sample_tokens.{name}"), "uniform", constant)
    logits = noise(4, 64, 1000) * 4
    for top_k, top_p in [(0, 1.0), (100, 1.0), (100, 0.9), (1, 1.0)]:
        result = sample_tokens(logits, top_k=top_k, top_p=top_p, seeds=torch.arange(4), log_probs=True)
        assert torch.isfinite(result.sampled_log_probs).all()
        kept = upstream_filter(logits, top_k, top_p if top_p < 1 else 0) > -math.inf
        assert kept.gather(-1, result.tokens[..., None]).all()
        if draw == 0:
            assert torch.equal(result.tokens, kept.int().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = noise(2, 9, 333).to(dtype)
    logits.view(-1)[:: 333 // 3] += 9
    result = sample_tokens(logits, top_k=1, seeds=torch.arange(2), log_probs=True)
    unique = (logits == logits.amax(-1, keepdim=True)).sum(-1) == 1
    assert unique.any()
    assert torch.equal(result.tokens[unique], logits.argmax(-1)[unique])
    assert (result.sampled_log_probs[unique] == 0).all()


def test_ties_for_the_largest_are_all_drawn() -> None:
    logits = torch.tensor([1.0, 3.0, 0.0, 3.0]).expand(40, 10, 4)
    result = sample_tokens(logits, top_k=1, seeds=torch.arange(40), log_probs=True)
    assert set(result.tokens.unique().tolist()) == {1, 3}
    torch.testing.assert_close(result.sampled_log_probs, torch.full((40, 10), math.log(0.5)))


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((4, 50, 6), -math.inf)
    logits[..., 2] = 0
    logits[..., 5] = -90
    for settings in ({"top_k": 4, "top_p": 0.9}, {"top_p": 0.9}, {"top_k": 4}, {"top_k": 1}, {}):
        assert (sample_tokens(logits, seeds=torch.arange(4), **settings).tokens == 2).all()


def test_banned_tokens_are_not_drawn() -> None:
    check_banned_tokens("reference")


FULL = {"guidance": 1.5, "temperature": 0.8, "top_p": 0.9, "log_probs": True}


@pytest.mark.parametrize("function", [sample_tokens, sample_bits, partial(sample_bits, backend="reference")])
@pytest.mark.parametrize("size", [33, 130])
def test_does_not_depend_on_the_batch(function: Any, size: int) -> None:
    """Samples alone, and tokens alone at their position, are bit-equal to those of the whole."""
    settings = {**FULL, "top_k": 20 if function is sample_tokens else 2}
    conditional, unconditional = noise(5, 7, size), noise(5, 7, size, seed=1)
    seeds = torch.arange(5) * 11
    whole = function(conditional, unconditional=unconditional, seeds=seeds, position=2, **settings)
    for b in range(5):
        for part in (slice(0, 7), slice(3, 4), slice(4, 7)):
            alone = function(
                conditional[b : b + 1, part],
                unconditional=unconditional[b : b + 1, part],
                seeds=seeds[b : b + 1],
                position=2 + part.start,
                **settings,
            )
            assert all(torch.equal(a[0], w[b, part]) for a, w in zip(alone, whole, strict=True))


def test_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpus = importlib.import_module("fastvar.kernels.sample_tokens.impl_torch")
    arguments = {"unconditional": noise(5, 7, 33, seed=1), "seeds": torch.arange(5), "top_k": 20, **FULL}
    whole = sample_tokens(noise(5, 7, 33), **arguments)
    for rows in (0, 1, 8):
        monkeypatch.setattr(on_cpus, "_CHUNK", 33 * rows)
        parts = sample_tokens(noise(5, 7, 33), **arguments)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_guidance_conventions() -> None:
    """VAR's (1 + t) c - t u, Infinity's c / tau first and then cfg c + (1 - cfg) u."""
    c, u = noise(2, 30, 12, dtype=torch.float64), noise(2, 30, 12, dtype=torch.float64, seed=1)
    seeds = torch.arange(2)
    got = sample_tokens(c, unconditional=u, guidance=2.0, temperature=0.5, seeds=seeds, log_probs=True)
    cfg = 3.0
    mixed = cfg * (c / 0.5) + (1 - cfg) * (u / 0.5)
    expected = sample_tokens(mixed, seeds=seeds, log_probs=True)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.sampled_log_probs, expected.log_probs)
    own = (c / 0.5).log_softmax(-1).gather(-1, got.tokens[..., None])[..., 0]
    torch.testing.assert_close(got.log_probs, own)


def test_low_precision_logits_are_read_exactly() -> None:
    logits = noise(2, 5, 40).bfloat16()
    for function in (sample_tokens, sample_bits):
        got = function(logits, top_p=0.9, seeds=torch.arange(2), log_probs=True)
        expected = function(logits.float(), top_p=0.9, seeds=torch.arange(2), log_probs=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert got.log_probs.dtype == got.sampled_log_probs.dtype == torch.float32


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_bits_are_a_vocabulary_of_two(top_p: float, top_k: int) -> None:
    """The closed form draws what `sample_tokens` draws from the pairs (0, z), ties included."""
    z = noise(3, 10, 8, dtype=torch.float64) * 3
    z[0, :, 0], z[1] = 0, (z[1] * 2).round() / 2
    settings: dict[str, Any] = {"top_p": top_p, "seeds": torch.arange(3), "log_probs": True}
    got = sample_bits(z, top_k=top_k, position=4, **settings)
    pairs = torch.stack([torch.zeros_like(z), z], -1).view(3, 80, 2)
    expected = sample_tokens(pairs, top_k=top_k, position=32, **settings)
    assert torch.equal(got.bits, expected.tokens.view(3, 10, 8) == 1)
    torch.testing.assert_close(got.log_probs, expected.log_probs.view(3, 10, 8).sum(-1))
    torch.testing.assert_close(got.sampled_log_probs, expected.sampled_log_probs.view(3, 10, 8).sum(-1))


def test_bits_equal_upstreams_filter() -> None:
    z = noise(1, 500, 4, dtype=torch.float64) * 4
    pairs = torch.stack([torch.zeros_like(z), z], -1).view(-1, 2)
    for top_p in (0.3, 0.97):
        certain = upstream_filter(pairs, 2, top_p).isinf().any(-1).view(z.shape)
        bits = torch.stack([sample_bits(z, top_p=top_p, seeds=torch.tensor([s])).bits for s in range(40)])
        assert torch.equal(bits[:, certain], (z > 0)[certain].expand(40, -1))
        fair = ~certain & (z.abs() < 1)
        assert (bits.any(0) & ~bits.all(0))[fair].all()


def test_bits_follow_the_logistic_distribution() -> None:
    z = torch.linspace(-4, 4, 9, dtype=torch.float64)
    bits = sample_bits(z.expand(40, 100, 9), seeds=torch.arange(40)).bits
    share, expected = bits.double().mean((0, 1)), z.sigmoid()
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


@pytest.mark.parametrize("function", [sample_tokens, sample_bits])
def test_scales_share_a_compiled_graph(function: Any) -> None:
    """Lengths, positions and VAR's rising guidance: one graph for a single token and one for all else."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (1, 2, 3, 4, 5):
        arguments = {"unconditional": noise(2, n * n, 9, seed=1), "guidance": 0.3 * n, "position": 10 * n + 1}
        arguments |= {"seeds": torch.arange(2), "top_p": 0.9, "log_probs": True}
        got, expected = compiled(noise(2, n * n, 9), **arguments), function(noise(2, n * n, 9), **arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("function", [sample_tokens, sample_bits])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, "logits: expected shape"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, "logits: expected a floating-point tensor"),
        ({"logits": torch.zeros(2, 3, 0)}, "of at least 1"),
        ({"unconditional": torch.zeros(2, 3, 5)}, r"unconditional: expected shape \(2, 3, 4\)"),
        ({"unconditional": torch.zeros(2, 3, 4).double()}, "unconditional: expected torch.float32"),
        ({"guidance": 1.0}, "unconditional: expected a tensor"),
        ({"temperature": 0}, "temperature: expected 1e-12 to .*top_k=1"),
        ({"temperature": -1.0}, r"temperature: expected 1e-12 to 1e\+12, got -1"),
        ({"temperature": 1e-38}, r"temperature: expected 1e-12 to 1e\+12, got 1e-38"),
        ({"guidance": math.nan}, r"guidance: expected -1e\+12 to 1e\+12, got nan"),
        ({"guidance": 1e39, "unconditional": torch.zeros(2, 3, 4)}, "guidance: expected"),
        ({"top_k": -1}, "top_k: expected"),
        ({"top_p": 1.5}, "top_p: expected a probability"),
        ({"top_p": math.nan}, "top_p: expected a probability"),
        ({"seeds": torch.arange(3)}, r"seeds: expected shape \(2\)"),
        ({"seeds": torch.zeros(2)}, "seeds: expected torch.int64"),
        ({"position": -1}, "position: expected at least 0"),
    ],
)
def test_wrong_arguments(function: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3, 4), "seeds": torch.arange(2), **change}
    with pytest.raises(ValueError, match=f"{function.__name__}: .*{message}|{function.__name__}: {message}"):
        function(**arguments)


def test_bits_have_no_third_choice() -> None:
    with pytest.raises(ValueError, match="sample_bits: top_k: expected 0, 1 or 2, got 900"):
        sample_bits(torch.zeros(1, 1, 1), seeds=torch.arange(1), top_k=900)
