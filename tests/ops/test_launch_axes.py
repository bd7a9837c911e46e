"""How kernels in Triton are launched, seen on tensors without memory: an axis y or z of a CUDA launch holds 65,535
blocks, so that what grows with the batch is on axis x, and the work of few images is divided to fill a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastvar.kernels.block_causal_attention import impl_triton as attention
from fastvar.kernels.group_norm_silu import impl_triton as group_norm

from fastvar import ScaleSchedule, ops
from fastvar.ops import PrefixKV
from tests.helpers.ahead_of_time import launches_of

MANY, MOST = 70_000, 65_535
TRITON = {"backend": "triton"}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, gradient: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def test_many_tokens() -> None:
    """Tiles of tokens are many too."""
    mask = empty(1, 1024, 1024, dtype=torch.float32)
    (launch,) = launches_of(lambda: ops.propagate_mask(mask, ScaleSchedule((1, 1024)), **TRITON))
    assert len(launch.grid) == 1 and launch.grid[0] > MOST


def test_many_images() -> None:
    x, y = (empty(MANY, 4, 64, gradient=True) for _ in range(2))
    gates = [empty(MANY, 64, gradient=True) for _ in range(3)]
    q, k = (empty(MANY, 2, 3, 64, gradient=True) for _ in range(2))
    log_scale = empty(3, dtype=torch.float32, gradient=True)
    heads = [empty(MANY, 2, 3, 64) for _ in range(5)]
    logits, mask = empty(MANY, 2, 50), empty(MANY, 2, 2, dtype=torch.float32)
    options: dict[str, Any] = {"unconditional": logits, "guidance": 1.5, "temperature": 0.9, "top_p": 0.96}
    options |= {"seeds": empty(MANY, dtype=torch.int64), "position": 5, "log_probs": True}
    calls: list[Callable[[], Any]] = [
        lambda: ops.adaptive_layer_norm(x, *gates[:2], **TRITON),
        lambda: ops.gated_residual(x, y, gates[0], **TRITON),
        lambda: ops.gated_residual_norm(x, y, *gates, **TRITON),
        lambda: ops.qk_norm_rope(q, k, log_scale=log_scale, **TRITON),
        lambda: ops.qk_norm_rope_into_cache(*heads, 0, log_scale=log_scale.detach(), **TRITON),
        lambda: ops.sample_tokens(logits, top_k=30, **options, **TRITON),
        lambda: ops.sample_bits(logits, **options, **TRITON),
        lambda: ops.propagate_mask(mask, ScaleSchedule((1, 2)), **TRITON),
    ]
    for call in calls:
        launches = launches_of(call)
        assert launches
        for launch in launches:
            assert launch.grid[0] >= MANY // 64, launch.kernel
            assert all(size <= MOST for size in launch.grid[1:]), (launch.kernel, launch.grid)


def test_attention_of_many_images() -> None:
    """4096 images of 16 heads, with a prefix each."""

    def call() -> Any:
        q, k, v = (empty(4096, 5, 16, 64, gradient=True) for _ in range(3))
        prefix = PrefixKV(*(empty(4096, 3, 16, 64, gradient=True) for _ in range(2)))
        own, shared = (t.detach() for t in (q, prefix.k))
        both = PrefixKV(shared, shared)
        ops.cached_attention(own, own, own, prefix=both, trunk=both, **TRITON)
        return ops.block_causal_attention(q, k, v, ScaleSchedule((1, 2)), prefix=prefix, **TRITON)

    launches = launches_of(call)
    assert {launch.kernel.__name__ for launch in launches} >= {
        "block_causal_attention_fwd_kernel",
        "block_causal_attention_bwd_prefix_kernel",
        "cached_attention_fwd_kernel",
        "cached_attention_fwd_merge_kernel",
    }
    assert all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize(
    ("count", "tokens", "head_dim", "least", "launched"),
    [(1, 680, 64, 384, 2), (64, 680, 64, 384, 12), (2, 10521, 128, 4000, 1), (1, 77, 64, 300, 2)],
)
def test_parts_fill_a_gpu_and_take_bounded_memory(
    count: int, tokens: int, head_dim: int, least: int, launched: int
) -> None:
    """One prefix of VAR-d16 is the work of several hundred programs, one of Infinity-2B of thousands without parts."""
    schedule = ScaleSchedule.parse("infinity-1M-1.000" if tokens > 680 else "var-256")

    def call() -> Any:
        q = empty(8 * count, schedule.num_tokens, 16, head_dim)
        prefix = PrefixKV(*(empty(count, tokens, 16, head_dim, gradient=True) for _ in range(2)))
        return ops.block_causal_attention(q, q, q, schedule, prefix=prefix, **TRITON)

    launches = [each for each in launches_of(call) if "_bwd_prefix_" in each.kernel.__name__]
    assert launches[0].grid[0] >= least and len(launches) == launched
    sums = launches[0].arguments[7]
    assert sums.dtype == torch.bfloat16 or 8 * sums.numel() <= attention.PARTS_BYTES


def test_group_norm_has_tiles_that_no_batch_decides() -> None:
    x = torch.empty(1, 1, 8).expand(70_000, 300, 8)
    one, many = group_norm._Launch(x[:1], 4), group_norm._Launch(x, 4)
    assert (one.size, one.parts, one.tile, one.group) == (many.size, many.parts, many.tile, many.group)
    assert many.blocks == 70_000 * one.blocks
