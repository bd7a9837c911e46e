"""Operators of sampling under torch.compile: one graph serves all scales but the one of a single token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastvar import ScaleSchedule, ops
from tests.helpers.samples import noise

SCHEDULE = ScaleSchedule.parse("var-256")


def attention(qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    end = start + qkv.shape[1]
    q = ops.qk_norm_rope_into_cache(*qkv.unbind(2), keys, values, start, log_scale=torch.zeros(2))
    return ops.cached_attention(q, keys[:, :end], values[:, :end])


def attention_inputs(start: int, length: int) -> tuple[Any, ...]:
    cache = noise(2, 2, 2, SCHEDULE.num_tokens, 8).transpose(2, 3)
    return noise(2, length, 3, 2, 8), *cache.unbind(), start


def norms(x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    return ops.gated_residual(x, ops.adaptive_layer_norm(x, modulation, modulation), modulation)


def sample(logits: torch.Tensor, seeds: torch.Tensor, start: int) -> torch.Tensor:
    return ops.sample_tokens(logits, seeds=seeds, position=start, top_k=9, top_p=0.9).tokens


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[int, int], tuple[Any, ...]]]] = {
    "attention": (attention, attention_inputs),
    "norms": (norms, lambda start, length: (noise(2, length, 16), noise(2, 16))),
    "sampling": (sample, lambda start, length: (noise(2, length, 40), torch.arange(2), start)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    function, inputs = CASES[name]
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for start, length in zip(SCHEDULE.starts, SCHEDULE.lengths, strict=True):
        torch.testing.assert_close(compiled(*inputs(start, length)), function(*inputs(start, length)))
    assert counter.frame_count <= 2, counter.frame_count
