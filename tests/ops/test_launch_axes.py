"""An axis y or z of a CUDA launch holds 65,535 blocks: what grows with the batch is on axis x. Seen on tensors without
memory, whose launches are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import launches_of
from fastvar.kernels.adaptive_layer_norm import impl_triton as norms
from fastvar.kernels.propagate_mask import impl_triton as masks
from fastvar.kernels.qk_norm_rope import impl_triton as rotations
from fastvar.kernels.sample_tokens import impl_triton as sampler

from fastvar import ScaleSchedule

MANY, MOST = 70_000, 65_535


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of tokens are many too."""
    monkeypatch.setattr(masks, "footprints", lambda *_: None)
    mask = empty(1, 1024, 1024, dtype=torch.float32)
    [launch] = launches_of(lambda: masks.forward(mask, ScaleSchedule((1, 1024)), "area", False))
    assert len(launch.grid) == 1 and launch.grid[0] > MOST


def test_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x, modulation, heads = empty(MANY, 4, 64), empty(MANY, 64), empty(MANY, 2, 3, 64)
    seeds, logits, mask = empty(MANY, dtype=torch.int64), empty(MANY, 2, 50), empty(MANY, 2, 2, dtype=torch.float32)
    monkeypatch.setattr(masks, "footprints", lambda *_: None)
    gates = [modulation] * 3
    needs = [True] * 5
    calls: list[Callable[[], Any]] = [
        lambda: norms.forward(x, modulation, modulation, 1e-6),
        lambda: norms.backward([x], x, modulation, modulation, 1e-6, needs[:3]),
        lambda: norms.gated_residual(x, x, modulation),
        lambda: norms.gated_residual_backward([x], x, x, modulation, needs[:3]),
        lambda: norms.gated_residual_norm(x, x, *gates, 1e-6),
        lambda: norms.gated_residual_norm_backward([x, x], x, x, *gates, 1e-6, [x, x], needs),
        lambda: rotations.forward(heads, heads, empty(3), None, None, 1e-12),
        lambda: rotations.into_cache(heads, heads, heads, heads, heads, 0, empty(3), None, None, 1e-12),
        lambda: rotations.backward([heads, heads], heads, heads, empty(3), None, None, 1e-12, needs),
        lambda: sampler.forward(logits, logits, seeds, 1.5, 0.9, 30, 0.96, 5, True),
        lambda: sampler.bits(logits, logits, seeds, 1.5, 0.9, 2, 0.96, 5, True),
        lambda: masks.forward(mask, ScaleSchedule((1, 2)), "area", False),
    ]
    for call in calls:
        launches = launches_of(call)
        assert launches
        for launch in launches:
            assert launch.grid[0] >= MANY // 64, launch.kernel
            assert all(size <= MOST for size in launch.grid[1:]), (launch.kernel, launch.grid)
