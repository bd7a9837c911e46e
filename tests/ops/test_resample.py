"""The taps and weights of one axis in csrc/resample.h against PyTorch's interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops._extension import missing

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
SIZES = (*range(1, 18), 24, 31, 36, 37, 64, 111)
PAIRS = [(size, out) for size in SIZES for out in SIZES]


def matrix(size: int, out: int, mode: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(out, size): what PyTorch makes of the images that are 1 at one cell."""
    cells = torch.eye(size, dtype=dtype)[None, :, None, :]
    return F.interpolate(cells, size=(1, out), mode=mode)[0, :, 0].T


@pytest.mark.parametrize(("mode", "taps"), [("bilinear", 2), ("bicubic", 4)])
def test_taps(mode: str, taps: int) -> None:
    """As near to float64 as PyTorch in float32 is, up to a rounding of the place and some of the weights."""
    for size, out in PAIRS:
        index, weight = torch.empty(out, taps, dtype=torch.int32), torch.empty(out, taps)
        torch.ops.fastvar_cpu.resample_taps(index, weight, size)
        assert index.min() >= 0 and index.max() < size
        found = torch.zeros(out, size).index_put_((torch.arange(out)[:, None], index.long()), weight, accumulate=True)
        exact = matrix(size, out, mode, torch.float64)
        error, own = (float((m.double() - exact).abs().max()) for m in (found, matrix(size, out, mode)))
        assert error <= 2 * own + (size + 4) * torch.finfo(torch.float32).eps, (size, out, error, own)


def test_area_bins() -> None:
    for size, out in PAIRS:
        bins = torch.empty(out, 2, dtype=torch.int32)
        torch.ops.fastvar_cpu.area_bins(bins, size)
        cells = torch.arange(size)
        inside = (cells >= bins[:, :1]) & (cells < bins[:, 1:])
        assert torch.equal(inside, matrix(size, out, "area") > 0)
