"""Triton's kernels as they are shipped, compiled for GPUs that are not there: they fit and use the matrix units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Launch, Needs, accesses, compile_for, launches_of
from fastvar.kernels.adaptive_layer_norm import impl_triton as norms
from fastvar.kernels.block_causal_attention import impl_triton as attention
from fastvar.kernels.block_causal_attention.tiles import BACKWARD_KV, BACKWARD_PREFIX, BACKWARD_Q, FORWARD
from fastvar.kernels.cached_attention import impl_triton as cached
from fastvar.kernels.cached_attention.tiles import PART
from fastvar.kernels.common import tiling
from fastvar.kernels.common.tiling import Card, family_of
from fastvar.kernels.qk_norm_rope import impl_triton as rotations

from fastvar import ScaleSchedule
from fastvar.ops import PrefixKV, rope_tables
from fastvar.ops.adaptive_layer_norm import GateCall, GateNormCall, NormCall
from fastvar.ops.block_causal_attention import AttentionCall
from fastvar.ops.cached_attention import CachedAttentionCall
from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall

SCHEDULE = ScaleSchedule.parse("var-256")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have
MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Bytes of a thread's registers that lie in memory instead, with triton 3.6 or 3.8.
STACK = {80: 64, 89: 64, 90: 64, 100: 64, 120: 80}


ATTENDED = Needs("q", "k", "v", "prefix_k", "prefix_v")


@pytest.fixture(params=[80, 89, 90, 100, 120])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a card: the kernels take its tiles."""
    family = family_of(divmod(request.param, 10))
    for module in (attention, cached):
        monkeypatch.setattr(module, "card", lambda device: Card("", family, tiling.SHARED[family]))
    return int(request.param)


def attention_launches(
    head_dim: int, dtype: torch.dtype, schedule: ScaleSchedule = SCHEDULE, **options: Any
) -> list[Launch]:
    """Forward and backward, over a prefix of some length, with gradients of everything."""
    q = torch.empty(2, schedule.num_tokens, 2, head_dim, dtype=dtype)
    prefix, lengths = torch.empty(1, 70, 2, head_dim, dtype=dtype), torch.tensor([50])
    shared = PrefixKV(prefix, prefix, lengths)
    given = AttentionCall(q, q, q, schedule, shared, 0.1, options.get("block_diagonal", False))

    def call() -> None:
        results = attention.forward(given)
        attention.backward(given, results, results, ATTENDED)

    return launches_of(call)


def cached_launches(head_dim: int, n: int, dtype: torch.dtype) -> list[Launch]:
    """One scale's queries to a ragged prefix, a trunk and own keys."""
    q, keys = torch.empty(4, n, 2, head_dim, dtype=dtype), torch.empty(4, 680, 2, head_dim, dtype=dtype)
    shared, lengths = keys[:2], torch.tensor([50, 600])
    prefix, trunk = PrefixKV(shared, shared, lengths), PrefixKV(shared, shared)
    return launches_of(lambda: cached.forward(CachedAttentionCall(q, keys, keys, prefix, trunk, 0.1)))


def small_launches(dtype: torch.dtype, width: int, head_dim: int) -> Iterator[Launch]:
    x, modulation = torch.empty(2, SCHEDULE.num_tokens, width, dtype=dtype), torch.empty(2, width, dtype=dtype)
    q = torch.empty(2, SCHEDULE.num_tokens, 3, 4, head_dim, dtype=dtype)[:, :, 0]
    log_scale = torch.empty(4)
    turned = QKNormRopeCall(q, q, log_scale, rope_tables(SCHEDULE, head_dim), 1e-12)
    norm, gate = NormCall(x, modulation, modulation, 1e-6), GateCall(x, x, modulation)
    both = GateNormCall(x, x, modulation, modulation, modulation, 1e-6)
    needs = Needs("x", "y", "gate", "scale", "shift", "q", "k", "log_scale")
    calls: list[Callable[[], Any]] = [
        lambda: norms.norm(norm),
        lambda: norms.norm_backward(norm, (), [x], needs),
        lambda: norms.gate(gate),
        lambda: norms.gate_backward(gate, (), [x], needs),
        lambda: norms.gate_norm(both),
        lambda: norms.gate_norm_backward(both, [x], [x, x], needs),
        lambda: rotations.forward(turned),
        lambda: rotations.into_cache(IntoCacheCall(q, q, q, q, q, 0, log_scale, None, 1e-12)),
        lambda: rotations.backward(turned, (), [q, q], needs),
    ]
    for call in calls:
        yield from launches_of(call)


def fits(launch: Launch, capability: int, matrix: str | None) -> str:
    """The assembly; with `matrix` all products are that instruction's."""
    found = compile_for(launch, capability)
    where = f"{launch.kernel.__name__}, sm_{capability}: {found._replace(ptx='')}"
    limit = tiling.SHARED[family_of(divmod(capability, 10))]
    assert found.stack <= STACK[capability] and found.shared <= limit, where
    if matrix is not None:
        assert matrix in found.ptx and not any(each in found.ptx for each in set(MATRIX.values()) - {matrix}), where
    return found.ptx


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention(capability: int, head_dim: int) -> None:
    """On all cards, with their own tiles."""
    launches = attention_launches(head_dim, torch.bfloat16)
    names = ["_forward", "_backward_q", "_backward_kv", "_backward_prefix", "_add_parts"]
    assert [launch.kernel.__name__ for launch in launches] == names
    for launch in launches:
        fits(launch, capability, None if launch.kernel.__name__ == "_add_parts" else MATRIX[capability])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_diagonal"),
    [
        (96, torch.bfloat16, False),
        (104, torch.float16, False),
        (64, torch.float32, False),
        (128, torch.float32, False),
        (64, torch.bfloat16, True),
    ],
)
def test_attention_of_other_kinds(capability: int, head_dim: int, dtype: torch.dtype, block_diagonal: bool) -> None:
    """Halves are loaded 16 bytes at a time whatever the head dimension."""
    for launch in attention_launches(head_dim, dtype, block_diagonal=block_diagonal)[:4]:
        matrix = MATRIX[80 if dtype == torch.float32 else capability]
        found = accesses(fits(launch, capability, matrix))
        if dtype != torch.float32:
            tile = launch.named["BLOCK_D"] * min(launch.named["BLOCK_M"], launch.named["BLOCK_N"])
            assert found["ld", 16] >= 4 * tile // 8 // (32 * launch.named["num_warps"]), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90], indirect=True)
def test_long_rows_by_descriptors(capability: int) -> None:
    """Keys and values that nothing masks come by bulk copies, and products overlap with them."""
    launch = attention_launches(128, torch.bfloat16, ScaleSchedule.parse("infinity-1M-1.000"))[0]
    assert launch.named["BLOCK_M"] == launch.named["BLOCK_N"] == 128
    assert fits(launch, capability, MATRIX[90]).count("cp.async.bulk.tensor") >= 4  # of the prefix and of the own


@pytest.mark.slow
@pytest.mark.parametrize(("n", "head_dim"), [(1, 64), (25, 64), (256, 64), (256, 128)])
def test_cached_attention(n: int, head_dim: int, capability: int) -> None:
    for launch in cached_launches(head_dim, n, torch.bfloat16):
        few = "mma.sync"  # Hopper's and Blackwell's own instructions take 64 rows and more
        instruction = few if n < 64 else MATRIX[capability]
        fits(launch, capability, None if launch.kernel.__name__ == "_merge" else instruction)


def test_launches_of_many_images() -> None:
    """Axes y and z hold 65,535 programs, so all lie along x: 4096 images of 16 heads, with a prefix each."""
    q, prefix = (torch.empty(4096, n, 16, 64, dtype=torch.float16, device="meta") for n in (5, 3))
    shared = PrefixKV(prefix, prefix)
    given = AttentionCall(q, q, q, ScaleSchedule((1, 2)), shared, 1.0, False)
    results = torch.empty_like(q), torch.empty(4096, 16, 5, device="meta")

    def call() -> None:
        attention.forward(given)
        attention.backward(given, results, (q, None), ATTENDED)
        cached.forward(CachedAttentionCall(q, q, q, shared, shared, 1.0))

    launches = launches_of(call)
    assert {launch.kernel.__name__ for launch in launches} >= {"_forward", "_backward_prefix", "_part", "_merge"}
    assert all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize(
    ("count", "tokens", "head_dim", "least", "launched"),
    [(1, 680, 64, 384, 2), (64, 680, 64, 384, 12), (2, 10521, 128, 4000, 1), (1, 77, 64, 300, 2)],
)
def test_parts_fill_a_gpu_and_take_bounded_memory(
    count: int, tokens: int, head_dim: int, least: int, launched: int
) -> None:
    """One prefix of VAR-d16 is the work of several hundred programs, one of Infinity-2B of thousands without parts."""
    prefix = torch.empty(count, tokens, 16, head_dim, dtype=torch.bfloat16, device="meta")
    q = torch.empty(8 * count, max(tokens, 680), 16, head_dim, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(8 * count, 16, q.shape[1], device="meta")
    given = attention._Given(AttentionCall(q, q, q, SCHEDULE, PrefixKV(prefix, prefix), 1.0, False))
    arguments = (given, prefix, prefix, q, lse, lse, prefix, prefix)
    launches = launches_of(lambda: attention._prefix_gradients(*arguments))
    assert launches[0].grid[0] >= least and len(launches) == launched
    sums = launches[0].arguments[7]
    assert sums.dtype == torch.bfloat16 or 8 * sums.numel() <= attention.PARTS_BYTES


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("family", tiling.SHARED)
def test_every_card_has_tiles(family: str, bits: int) -> None:
    """For head dimensions up to 256."""
    card = Card("", family, tiling.SHARED[family])
    for table in (FORWARD, BACKWARD_Q, BACKWARD_KV, BACKWARD_PREFIX, PART):
        for head_dim in (8, 64, 80, 128, 192, 256):
            for size in (1, 680, 10521):
                key = {"bits": bits, "head_dim": head_dim, "queries" if table is PART else "length": size}
                assert table.choose(card, **key)["BLOCK_M"] >= 16


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("width", "head_dim"), [(1024, 64), (1920, 120)])
def test_small_operators(width: int, head_dim: int, capability: int) -> None:
    for launch in small_launches(torch.bfloat16, width, head_dim):
        found = compile_for(launch, capability)
        assert found.stack == 0 and found.shared <= SHARED[80], (launch.kernel.__name__, found._replace(ptx=""))
