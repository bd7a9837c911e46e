"""The quantiser's kernels in Triton, compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_for, launches_of
from fastvar.kernels.residual_quantize import impl_triton

SHARED = 163 * 1024  # bytes that a block may have on the smallest


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("channels", [8, 32, 64])
@pytest.mark.parametrize("length", [1, 256])
def test_search(length: int, channels: int, capability: int) -> None:
    """Products are in float32 and not in TF32, for few rows and for many."""
    rows, codebook, norms = torch.empty(2, length, channels), torch.empty(4096, channels), torch.empty(4096)
    [launch] = launches_of(lambda: impl_triton._search(rows, codebook, norms))
    found = compile_for(launch, capability)
    assert found.stack == 0 and found.shared <= SHARED, found._replace(ptx="")
    assert "tf32" not in found.ptx and "fma.rn.f32" in found.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (16, 16)])
@pytest.mark.parametrize("channels", [3, 32])
def test_resampling(channels: int, grid: tuple[int, int], capability: int) -> None:
    """From an image to rows and from tokens to an image, at the coarsest grid, one between, and the finest."""
    image, codebook = torch.empty(2, channels, 16, 16), torch.empty(4096, channels)
    tokens = torch.empty(2, grid[0] * grid[1], dtype=torch.int64)

    def call() -> None:
        impl_triton._means(image, grid)
        impl_triton._upsampled(tokens, codebook, grid, (16, 16), None)

    launches = launches_of(call)
    assert len(launches) == 2
    for launch in launches:
        found = compile_for(launch, capability)
        assert found.stack == 0 and found.shared <= SHARED, found._replace(ptx="")
