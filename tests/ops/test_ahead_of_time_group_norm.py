"""Group norm in Triton, compiled for GPUs that are not there: no spill, 16-byte accesses, one launch axis."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Launch, Needs, accesses, compile_for, launches_of
from fastvar.kernels.group_norm_silu import impl_triton

from fastvar.ops.group_norm_silu import GroupNormCall

BY_ROW = ("_moments", "_forward", "_gradient_sums", "_backward")  # these move memory; the others add up small sums


def launches(channels: int, dtype: torch.dtype) -> list[Launch]:
    x, weight = torch.empty(2, 4096, channels, dtype=dtype), torch.empty(channels)

    def call() -> None:
        call = GroupNormCall(x, weight, weight, weight, 32, 1e-6, True)
        impl_triton.forward(call)
        impl_triton.backward(call._replace(shift=None), (), [x], Needs("x", "weight", "bias"))

    return launches_of(call)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("channels", "dtype"), [(160, torch.bfloat16), (640, torch.bfloat16), (320, torch.float32)])
def test_compiles_without_spills_and_moves_wide(channels: int, dtype: torch.dtype, capability: int) -> None:
    seen = set()
    for launch in launches(channels, dtype):
        name = launch.kernel.fn.__name__
        compiled = compile_for(launch, capability)
        assert compiled.stack == 0, (name, compiled.stack)
        if name in BY_ROW:
            seen.add(name)
            moved = accesses(compiled.ptx)
            wide = sum(count for (_, size), count in moved.items() if size >= 16)
            # narrow is only what there is one of for each channel
            assert wide >= 4 and sum(moved.values()) - wide <= 6, (name, moved)
            assert all(size >= 16 for way, size in moved if name in ("_forward", "_backward") and way == "st"), moved
    assert seen == set(BY_ROW)


def test_one_launch_axis_and_tiles_that_no_batch_decides() -> None:
    x = torch.empty(1, 1, 8).expand(70_000, 300, 8)
    one, many = impl_triton._Launch(x[:1], 4), impl_triton._Launch(x, 4)
    assert (one.size, one.parts, one.tile, one.group) == (many.size, many.parts, many.tile, many.group)
    assert many.blocks == 70_000 * one.blocks
