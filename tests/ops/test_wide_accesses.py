"""Kernels whose time is that of the memory move 16 bytes a thread and instruction: read from their compiled code.

What is loaded once a row or once a program (a scale, an angle's place) may be narrow, a few instructions a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Launch, Needs, accesses, compile_for, launches_of
from fastvar.kernels.adaptive_layer_norm import impl_triton as norms
from fastvar.kernels.qk_norm_rope import impl_triton as rotations
from fastvar.kernels.sample_tokens import impl_triton as sampler

from fastvar.ops.adaptive_layer_norm import GateCall, GateNormCall, NormCall
from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall, Rope
from fastvar.ops.sample_tokens import SampleCall

WIDE = 16


def heads(dtype: torch.dtype, head_dim: int, count: int = 2) -> list[torch.Tensor]:
    """Slices of one projection."""
    return list(torch.empty(2, 9, count, 6, head_dim, dtype=dtype, device="meta").unbind(2))


def turned(head_dim: int) -> Rope:
    return Rope(*(torch.empty(9, head_dim // 2, device="meta") for _ in range(2)))


def rotate(dtype: torch.dtype, head_dim: int, norm: bool = True, turn: bool = False) -> Launch:
    q, k = heads(dtype, head_dim)
    scale, tables = torch.empty(6, device="meta") if norm else None, turned(head_dim) if turn else None
    return one(lambda: rotations.forward(QKNormRopeCall(q, k, scale, tables, 1e-12)))


def rotate_into_cache(dtype: torch.dtype, head_dim: int, turn: bool = False) -> Launch:
    """A cache whose rows of a head lie together."""
    caches = torch.empty(2, 2, 6, 20, head_dim, dtype=dtype, device="meta").transpose(2, 3)
    tables = turned(head_dim) if turn else None
    scale = torch.empty(6, device="meta")
    call = IntoCacheCall(*heads(dtype, head_dim, 3), *caches, 3, scale, tables, 1e-12)
    return one(lambda: rotations.into_cache(call))


def rotate_back(dtype: torch.dtype, head_dim: int, turn: bool = False) -> Launch:
    q, k = heads(dtype, head_dim)
    tables = turned(head_dim) if turn else None
    scale, grads = torch.empty(6, device="meta"), heads(dtype, head_dim)
    call = QKNormRopeCall(q, k, scale, tables, 1e-12)
    return one(lambda: rotations.backward(call, (), grads, Needs("q", "k", "log_scale")))


def rows(dtype: torch.dtype, width: int) -> torch.Tensor:
    return torch.empty(2, 70, width, dtype=dtype, device="meta")


def modulations(dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    """As models hand them over: neighbours in one tensor."""
    return list(torch.empty(2, 6, width, dtype=dtype, device="meta").unbind(1)[2:5])


def one(call: Callable[[], Any]) -> Launch:
    return launches_of(call)[0]


def tile_bytes(launch: Launch, tensor: int) -> int:
    """Of a tile of a tensor argument."""
    named = launch.named
    width = named["BLOCK_D"] if "BLOCK_D" in named else named["BLOCK"]
    return int(named["ROWS"] * width * launch.arguments[tensor].element_size())


def held(launch: Launch, loads: int, stores: int) -> None:
    """So many tiles are loaded and stored in wide accesses, and there are but a few narrow ones."""
    few = 2 * launch.arguments[0].element_size()  # a thread holds more rows of a wider type
    found = accesses(compile_for(launch, 90).ptx)
    threads = 32 * launch.named["num_warps"]
    each = tile_bytes(launch, 0) // (WIDE * threads)
    where = f"{launch.kernel.__name__}: {dict(found)}"
    assert each >= 1, where
    assert found["ld", WIDE] >= loads * each and found["st", WIDE] >= stores * each, where
    assert sum(number for (_, size), number in found.items() if size < WIDE) <= few, where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, d) for d in (64, 96, 104, 112, 120, 128)] + [(torch.float16, 64), (torch.float32, 104)],
)
def test_normalised_heads(dtype: torch.dtype, head_dim: int) -> None:
    """Queries and keys; those, values and a cache; both and their gradients."""
    held(rotate(dtype, head_dim), 2, 2)
    held(rotate(dtype, head_dim, norm=False, turn=True), 2, 2)
    held(rotate_into_cache(dtype, head_dim), 3, 3)
    held(rotate_back(dtype, head_dim), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.bfloat16, 104), (torch.float32, 64)])
def test_rotated_heads(dtype: torch.dtype, head_dim: int) -> None:
    """With tables: pairs are taken apart in registers."""
    held(rotate(dtype, head_dim, turn=True), 2, 2)
    held(rotate_into_cache(dtype, head_dim, turn=True), 3, 3)
    held(rotate_back(dtype, head_dim, turn=True), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("modulation", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bfloat16, 256),
        (torch.bfloat16, 1024),
        (torch.bfloat16, 1920),
        (torch.bfloat16, 2048),
        (torch.float32, 1024),
    ],
)
def test_rows_of_channels(dtype: torch.dtype, width: int, modulation: torch.dtype) -> None:
    """Modulations are loaded wide too."""
    x, (gate, scale, shift) = rows(dtype, width), modulations(modulation, width)
    norm, gated = NormCall(x, scale, shift, 1e-6), GateCall(x, x, gate)
    both, needs = GateNormCall(x, x, gate, scale, shift, 1e-6), Needs("x", "y", "gate", "scale", "shift")
    held(one(lambda: norms.norm(norm)), 1, 1)
    held(one(lambda: norms.gate(gated)), 2, 1)
    held(one(lambda: norms.gate_norm(both)), 2, 2)
    held(one(lambda: norms.norm_backward(norm, (), [x], needs)), 2, 1)
    held(one(lambda: norms.gate_backward(gated, (), [x], needs)), 2, 1)
    held(one(lambda: norms.gate_norm_backward(both, [x], [x, x], needs)), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4096, 16384])
def test_rows_of_logits(size: int, dtype: torch.dtype) -> None:
    """Both halves of a row, into registers; then a block again."""
    logits, seeds = (
        torch.empty(2, 3, size, dtype=dtype, device="meta"),
        torch.empty(2, dtype=torch.int64, device="meta"),
    )
    launch = one(lambda: sampler.tokens(SampleCall(logits, logits, seeds, 1.5, 1.0, 900, 0.96, 0, True)))
    found = accesses(compile_for(launch, 90).ptx)
    each = size * logits.element_size() // (WIDE * 32 * launch.named["num_warps"])
    assert found["ld", WIDE] >= 2 * each, found
    assert sum(found.values()) - found["ld", WIDE] <= 6, found


@pytest.mark.slow
def test_it_sees_narrow_accesses() -> None:
    """Rows that do not begin at multiples of 16 bytes cannot be loaded so."""
    with pytest.raises(AssertionError, match="_forward"):
        held(rotate(torch.bfloat16, 12), 2, 2)
