"""Triton's kernels as they are shipped, compiled for GPUs that are not there: they fit and use the matrix units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Launch, compile_for, launches_of
from fastvar.kernels.adaptive_layer_norm import impl_triton as norms
from fastvar.kernels.block_causal_attention import impl_triton as attention
from fastvar.kernels.cached_attention import impl_triton as cached
from fastvar.kernels.qk_norm_rope import impl_triton as rotations

from fastvar import ScaleSchedule
from fastvar.ops import rope_tables

SCHEDULE = ScaleSchedule.parse("var-256")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Bytes of a thread's registers that lie in memory instead, with triton 3.6 or 3.8. The tiles are chosen for Hopper.
STACK = {80: 256, 90: 160, 100: 640}


def attention_launches(head_dim: int, dtype: torch.dtype, **options: Any) -> list[Launch]:
    """Forward and backward, over a prefix of some length, with gradients of everything."""
    q = torch.empty(2, SCHEDULE.num_tokens, 2, head_dim, dtype=dtype)
    prefix, lengths = torch.empty(1, 70, 2, head_dim, dtype=dtype), torch.tensor([50])
    rest = (SCHEDULE, prefix, prefix, lengths, 0.1, options.get("block_diagonal", False), True)

    def call() -> None:
        results = attention.forward(q, q, q, *rest)
        attention.backward(results, q, q, q, *rest, results, [True] * 5)

    return launches_of(call)


def cached_launches(head_dim: int, n: int, dtype: torch.dtype) -> list[Launch]:
    """One scale's queries to a ragged prefix, a trunk and own keys."""
    q, keys = torch.empty(4, n, 2, head_dim, dtype=dtype), torch.empty(4, 680, 2, head_dim, dtype=dtype)
    shared, lengths = keys[:2], torch.tensor([50, 600])
    return launches_of(lambda: cached.forward(q, keys, keys, shared, shared, lengths, shared, shared, 0.1))


def small_launches(dtype: torch.dtype, width: int, head_dim: int) -> Iterator[Launch]:
    x, modulation = torch.empty(2, SCHEDULE.num_tokens, width, dtype=dtype), torch.empty(2, width, dtype=dtype)
    q = torch.empty(2, SCHEDULE.num_tokens, 3, 4, head_dim, dtype=dtype)[:, :, 0]
    cos, sin = rope_tables(SCHEDULE, head_dim)
    log_scale = torch.empty(4)
    calls: list[Callable[[], Any]] = [
        lambda: norms.forward(x, modulation, modulation, 1e-6),
        lambda: norms.backward([x], x, modulation, modulation, 1e-6, [True] * 3),
        lambda: norms.gated_residual(x, x, modulation),
        lambda: norms.gated_residual_backward([x], x, x, modulation, [False, True, True]),
        lambda: norms.gated_residual_norm(x, x, modulation, modulation, modulation, 1e-6),
        lambda: norms.gated_residual_norm_backward([x, x], x, x, *[modulation] * 3, 1e-6, [x, x], [True] * 5),
        lambda: rotations.forward(q, q, log_scale, cos, sin, 1e-12),
        lambda: rotations.into_cache(q, q, q, q, q, 0, log_scale, None, None, 1e-12),
        lambda: rotations.backward([q, q], q, q, log_scale, cos, sin, 1e-12, [True] * 3),
    ]
    for call in calls:
        yield from launches_of(call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [
        (80, 64, torch.bfloat16),
        (80, 128, torch.bfloat16),
        (90, 64, torch.bfloat16),
        (90, 128, torch.bfloat16),
        (90, 104, torch.float16),
        (90, 64, torch.float32),
        (90, 96, torch.bfloat16),
        (100, 64, torch.bfloat16),
        (100, 128, torch.bfloat16),
    ],
)
def test_attention(capability: int, head_dim: int, dtype: torch.dtype) -> None:
    """One shape stands for all on other GPUs than Hopper, as compiling takes long."""
    launches = attention_launches(head_dim, dtype)
    assert len(launches) == 5
    for launch in launches:
        found = compile_for(launch, capability)
        where = f"{launch.kernel.__name__}, sm_{capability}: {found._replace(ptx='')}"
        assert found.stack <= STACK[capability] and found.shared <= SHARED[capability], where
        matrix = "mma.sync" if dtype == torch.float32 else MATRIX[capability]
        assert launch.kernel.__name__ == "_delta" or matrix in found.ptx, where


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("n", "head_dim"), [(1, 64), (256, 64), (256, 128)])
def test_cached_attention(n: int, head_dim: int, capability: int) -> None:
    for launch in cached_launches(head_dim, n, torch.bfloat16):
        found = compile_for(launch, capability)
        where = f"{launch.kernel.__name__}, sm_{capability}: {found._replace(ptx='')}"
        assert found.stack <= STACK[capability] and found.shared <= SHARED[capability], where
        few = "mma.sync"  # Hopper's and Blackwell's own instructions take 64 rows and more
        instruction = few if 2 * n < 64 else MATRIX[capability]
        assert launch.kernel.__name__ == "_merge" or instruction in found.ptx, where


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("width", "head_dim"), [(1024, 64), (1920, 120)])
def test_small_operators(width: int, head_dim: int, capability: int) -> None:
    for launch in small_launches(torch.bfloat16, width, head_dim):
        found = compile_for(launch, capability)
        assert found.stack == 0 and found.shared <= SHARED[80], (launch.kernel.__name__, found._replace(ptx=""))
