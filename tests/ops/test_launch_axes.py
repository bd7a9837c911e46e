"""An axis y or z of a CUDA launch holds 65,535 blocks: what grows with the batch is on axis x. Seen on tensors without
memory, whose launches are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Needs, launches_of
from fastvar.kernels.adaptive_layer_norm import impl_triton as norms
from fastvar.kernels.propagate_mask import impl_triton as masks
from fastvar.kernels.qk_norm_rope import impl_triton as rotations
from fastvar.kernels.sample_tokens import impl_triton as sampler

from fastvar import ScaleSchedule
from fastvar.ops.adaptive_layer_norm import GateCall, GateNormCall, NormCall
from fastvar.ops.propagate_mask import PropagateMaskCall
from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall
from fastvar.ops.sample_tokens import SampleCall

MANY, MOST = 70_000, 65_535


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of tokens are many too."""
    monkeypatch.setattr(masks, "footprints", lambda *_: None)
    mask = empty(1, 1024, 1024, dtype=torch.float32)
    [launch] = launches_of(lambda: masks.forward(PropagateMaskCall(mask, ScaleSchedule((1, 1024)), "area", False)))
    assert len(launch.grid) == 1 and launch.grid[0] > MOST


def test_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x, modulation, heads = empty(MANY, 4, 64), empty(MANY, 64), empty(MANY, 2, 3, 64)
    seeds, logits, mask = empty(MANY, dtype=torch.int64), empty(MANY, 2, 50), empty(MANY, 2, 2, dtype=torch.float32)
    monkeypatch.setattr(masks, "footprints", lambda *_: None)
    norm, gate = NormCall(x, modulation, modulation, 1e-6), GateCall(x, x, modulation)
    both = GateNormCall(x, x, *[modulation] * 3, 1e-6)
    rotated = QKNormRopeCall(heads, heads, empty(3), None, 1e-12)
    needs = Needs("x", "y", "gate", "scale", "shift", "q", "k", "log_scale")
    calls: list[Callable[[], Any]] = [
        lambda: norms.norm(norm),
        lambda: norms.norm_backward(norm, (), [x], needs),
        lambda: norms.gate(gate),
        lambda: norms.gate_backward(gate, (), [x], needs),
        lambda: norms.gate_norm(both),
        lambda: norms.gate_norm_backward(both, [x], [x, x], needs),
        lambda: rotations.forward(rotated),
        lambda: rotations.into_cache(IntoCacheCall(*[heads] * 5, 0, empty(3), None, 1e-12)),
        lambda: rotations.backward(rotated, (), [heads, heads], needs),
        lambda: sampler.tokens(SampleCall(logits, logits, seeds, 1.5, 0.9, 30, 0.96, 5, True)),
        lambda: sampler.bits(SampleCall(logits, logits, seeds, 1.5, 0.9, 2, 0.96, 5, True)),
        lambda: masks.forward(PropagateMaskCall(mask, ScaleSchedule((1, 2)), "area", False)),
    ]
    for call in calls:
        launches = launches_of(call)
        assert launches
        for launch in launches:
            assert launch.grid[0] >= MANY // 64, launch.kernel
            assert all(size <= MOST for size in launch.grid[1:]), (launch.kernel, launch.grid)
