"""sample_bits in C++ against the reference and float64. What any implementation owes: test_sample_tokens.py."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_as_accurate
from samples import noise

from fastvar import build
from fastvar.ops import SampledBits, sample_bits
from fastvar.ops._dispatch import REGISTRY
from fastvar.random import uniform

IN_CPP = [i for i in REGISTRY["sample_bits"] if i.backend == "cpu" and i.missing() is None]
pytestmark = pytest.mark.skipif(not IN_CPP, reason="the cpu extension is not built")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9, "temperature": 0.7},
    {"guidance": 3.0, "temperature": 0.5, "top_p": 0.97},
    {"guidance": 0.0, "temperature": 1.3},
    {"guidance": 1.5, "top_k": 1},
]


def inputs(batch: int = 3, count: int = 700, depth: int = 33, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "logits": noise(batch, count, depth, seed=seed) * 3,
        "unconditional": noise(batch, count, depth, seed=seed + 1) * 3,
        "seeds": torch.arange(batch) * 2**40 - 1,
    }


def guided(logits: torch.Tensor, unconditional: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    guidance = settings.get("guidance", 0.0)
    mixed = logits * (1 + guidance) - unconditional * guidance if guidance else logits
    return mixed / settings.get("temperature", 1.0)


def numbers(seeds: torch.Tensor, count: int, depth: int, position: int) -> torch.Tensor:
    counters = torch.arange(position * depth, (position + count) * depth).view(count, depth)
    return uniform(seeds[:, None, None], torch.zeros(1, 1, 1, dtype=torch.int64), counters)


def choiceless(z: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    top_p = settings.get("top_p", 1.0)
    cutoff = math.log(top_p / (1 - top_p)) if 0 < top_p < 1 else math.inf
    return (z.abs() >= (0 if settings.get("top_k") == 1 else cutoff)) & (z != 0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_right_save_near_ties(settings: dict[str, Any]) -> None:
    """Against float64 from the same float32 logits. The probability of 0 may be off by twice what PyTorch's is; draws
    that come so close to it, far fewer than one in a hundred thousand, may go either way."""
    given = inputs()
    got = sample_bits(**given, **settings, position=7, backend="cpu").bits
    z = guided(given["logits"], given["unconditional"], settings)
    zero = 1 / (1 + z.double().exp())
    draw = numbers(given["seeds"], 700, 33, 7).double()
    certain = choiceless(z, settings)
    error = float((1 / (1 + z.exp()) - zero).abs().max())
    near = ((draw - zero).abs() <= 2 * error + 2.0**-24) & ~certain
    expected = torch.where(certain, z > 0, draw >= zero)
    assert torch.equal(got[~near], expected[~near])
    assert near.sum() <= 1e-5 * near.numel() + 2
    reference = sample_bits(**given, **settings, position=7, backend="reference").bits
    assert torch.equal(got[~near], reference[~near])


@pytest.mark.parametrize("offset", [-1, 1])
def test_probability_of_zero_is_accurate(offset: int) -> None:
    """Logits for which 0's probability lies two steps of a draw beside it: every bit must fall on the right side."""
    seeds = torch.arange(4)
    draw = numbers(seeds, 1000, 32, 0).double()
    wanted = (draw + offset * 2 * 2.0**-24).clamp(2.0**-23, 1 - 2.0**-23)
    z = ((1 - wanted) / wanted).log().float()
    zero = 1 / (1 + z.double().exp())
    apart = (draw - zero).abs() >= 1.5 * 2.0**-24  # rounding of z moves it, most where it is large
    assert apart.float().mean() > 0.5
    got = sample_bits(z, seeds=seeds, backend="cpu").bits
    assert torch.equal(got[apart], (draw >= zero)[apart])


@pytest.mark.parametrize("depth", [1, 5, 16, 33, 2000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_log_probs_are_as_accurate_as_the_references(settings: dict[str, Any], depth: int) -> None:
    given = inputs(2, 60, depth, seed=3)
    arguments = {**given, **settings, "log_probs": True}
    got, plain = (sample_bits(**arguments, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(got.bits, plain.bits)  # no near tie among these
    sign = got.bits.double() * 2 - 1
    z = guided(given["logits"], given["unconditional"], settings)
    own = F.logsigmoid(sign * given["logits"].double() / settings.get("temperature", 1.0)).sum(-1)
    sampled = F.logsigmoid(sign * z.double()).masked_fill(choiceless(z, settings), 0).sum(-1)
    assert got.log_probs is not None and got.sampled_log_probs is not None
    assert plain.log_probs is not None and plain.sampled_log_probs is not None
    assert_as_accurate(got.log_probs, plain.log_probs, own)
    assert_as_accurate(got.sampled_log_probs, plain.sampled_log_probs, sampled)


def test_extreme_logits() -> None:
    z = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 87, -87, 88.5, -88.5, 89, -89, 1e4, -1e4, math.inf, -math.inf])
    z = z.expand(50, 3, len(z))
    for settings in ({}, {"top_p": 0.9}, {"top_k": 1}):
        got, expected = (
            sample_bits(z, seeds=torch.arange(50), log_probs=True, backend=b, **settings) for b in ("cpu", "reference")
        )
        assert_same(got, expected)
    got = sample_bits(torch.full((1, 2, 3), math.nan), seeds=torch.arange(1), log_probs=True, backend="cpu")
    assert not got.bits.any() and got.log_probs is not None and got.log_probs.isnan().all()


def assert_same(got: SampledBits, expected: SampledBits) -> None:
    assert torch.equal(got.bits, expected.bits)
    torch.testing.assert_close(got.log_probs, expected.log_probs)
    torch.testing.assert_close(got.sampled_log_probs, expected.sampled_log_probs)


def test_neither_threads_nor_parts_matter() -> None:
    """Bit for bit, for pieces that fall anywhere in the pieces in which it is done."""
    given = inputs(3, 1500, 18)
    threads = torch.get_num_threads()
    settings: dict[str, Any] = {"guidance": 1.5, "top_p": 0.9, "log_probs": True, "backend": "cpu"}
    whole = sample_bits(**given, **settings)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = sample_bits(**given, **settings)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    for part in (slice(0, 1), slice(55, 58), slice(1499, 1500), slice(300, 1400)):
        sliced = {n: t if n == "seeds" else t[:, part] for n, t in given.items()}
        alone = sample_bits(**sliced, **settings, position=part.start)
        assert all(torch.equal(a, w[:, part]) for a, w in zip(alone, whole, strict=True))


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"logits": torch.zeros(2, 3)}, r"logits: expected shape \(\*, \*, \*\), got \(2, 3\)"),
    ({"logits": torch.zeros(2, 3, 5, dtype=torch.bfloat16)}, "logits: expected another dtype"),
    ({"logits": torch.zeros(2, 5, 3).mT}, "logits: expected a contiguous tensor"),
    ({"logits": torch.zeros(2, 3, 0)}, "bits of a token: expected 1 to 2147483647, got 0"),
    ({"unconditional": torch.zeros(2, 3, 4)}, r"unconditional: expected shape \(2, 3, 5\), got \(2, 3, 4\)"),
    ({"unconditional": torch.zeros(1, 3, 5).expand(2, 3, 5)}, "unconditional: expected a contiguous tensor"),
    ({"seeds": torch.zeros(1, dtype=torch.int64)}, r"seeds: expected shape \(2\), got \(1\)"),
    ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds: expected another dtype"),
    ({"bits": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"bits: expected shape \(2, 3, 5\), got \(2, 3, 4\)"),
    ({"own": torch.zeros(1)}, r"own: expected shape \(2, 3\), got \(1\)"),
    ({"sampled": torch.zeros(0)}, r"sampled: expected shape \(2, 3\), got \(0\)"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS)
def test_the_op_refuses_what_does_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Called without the public function's checks, it reads and writes nothing past an end."""
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 3, 5), "unconditional": torch.zeros(2, 3, 5), "seeds": torch.arange(2),
        "guidance": 1.0, "temperature": 1.0, "cutoff": 4.0, "first": 0, "bits": torch.zeros(2, 3, 5, dtype=torch.bool),
        "own": torch.zeros(2, 3), "sampled": torch.zeros(2, 3),
    }  # fmt: skip
    torch.ops.fastvar_cpu.sample_bits(**arguments)
    with pytest.raises(RuntimeError, match=f"sample_bits: {message}"):
        torch.ops.fastvar_cpu.sample_bits(**{**arguments, **wrong})


def test_every_processor_gives_the_same_bits(tmp_path: Path) -> None:
    """A build without the variants for newer processors agrees in the last digit."""
    (tmp_path / "fastvar").mkdir()
    (tmp_path / "csrc").mkdir()
    shutil.copy(build.PACKAGE / "build.py", tmp_path / "fastvar")
    for name in ("common.h", "checks.h", "philox.h", "elementary.h", "sample_bits.cpp"):
        shutil.copy(build.source_folder() / name, tmp_path / "csrc")
    plain = " ".join([*build.find_cxx(), "-DFASTVAR_CLONES="])
    code = (
        "import sys, torch; sys.path.insert(0, 'fastvar'); import build\n"
        "torch.ops.load_library(build.build(['cpu'])['cpu']); calls = torch.load('calls.pt')\n"
        "for call in calls: torch.ops.fastvar_cpu.sample_bits(*call)\n"
        "torch.save([call[-3:] for call in calls], 'results.pt')"
    )
    given = inputs(2, 300, 33)
    calls = []
    for unconditional in (None, given["unconditional"]):
        results = torch.empty(2, 300, 33, dtype=torch.bool), torch.empty(2, 300), torch.empty(2, 300)
        calls.append((given["logits"], unconditional, given["seeds"], 1.5, 0.7, 4.0, 5, *results))
    torch.save(calls, tmp_path / "calls.pt")
    environment = {**os.environ, "CXX": plain, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for call, found in zip(calls, torch.load(tmp_path / "results.pt"), strict=True):
        torch.ops.fastvar_cpu.sample_bits(*call)
        assert all(torch.equal(a, b) for a, b in zip(call[-3:], found, strict=True))
