"""The sampler on a GPU with vocabularies as they are: the CPU's sets and tokens, and safe in a CUDA graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import distance
from fastvar.kernels.sample_tokens import reference
from samples import noise

from fastvar.ops import sample_bits, sample_tokens
from fastvar.random import uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EDGE = 2e-6  # of the probability: so close to a bound the roundings of float32 decide


@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.96), (900, 1.0), (0, 0.96), (0, 1.0), (1, 1.0)])
@pytest.mark.parametrize("size", [1000, 4096, 16384, 32768])
def test_tokens_of_the_cpu(size: int, top_k: int, top_p: float) -> None:
    """All but a few, whose draws lie at the bound between two tokens."""
    both = 2 * noise(4, 200, size)
    seeds, count = torch.tensor([3, -7]), 200
    options: dict[str, Any] = {"guidance": 1.5, "temperature": 0.9, "top_k": top_k, "top_p": top_p, "log_probs": True}
    wanted = sample_tokens(both[:2], unconditional=both[2:], seeds=seeds, **options)
    device = both.cuda()
    got = sample_tokens(device[:2], unconditional=device[2:], seeds=seeds.cuda(), backend="triton", **options)
    found = [result.cpu() for result in got]
    same = found[0] == wanted.tokens
    z = reference._guided(both[:2], both[2:], 1.5, 0.9)
    threshold = reference._threshold(z, top_k, top_p)
    kept = z.double().masked_fill(z < (-math.inf if threshold is None else threshold), -math.inf)
    draws = uniform(seeds[:, None], torch.zeros(1, dtype=torch.int64), torch.arange(count)).double()
    assert (~same).sum() <= 4
    assert same.all() or distance(found[0][~same], draws[~same], kept[~same]).max() < EDGE
    for scores, expected in zip(found[1:], wanted[1:], strict=True):
        # another set would change all scores of a row by the share of a token: some may, where masses meet 1 - p
        off = (scores - expected).abs()[same]
        assert off.median() < 5e-6 and (off > 2e-5).sum() <= (4 if 0 < top_p < 1 else 0)


@pytest.mark.parametrize("function", [sample_tokens, sample_bits])
def test_in_a_cuda_graph(function: Any) -> None:
    """A replay reads what then lies in the inputs."""
    logits, seeds = noise(2, 5, 64).cuda(), torch.arange(2).cuda()
    options: dict[str, Any] = {"seeds": seeds, "top_p": 0.9, "log_probs": True, "backend": "triton"}
    function(logits, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(logits, **options)
    logits.copy_(noise(2, 5, 64, seed=1))
    seeds.add_(7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, function(logits, **options), strict=True))
