"""The accuracy that an operator owes: at most twice the error of plain PyTorch in the same dtype."""

from __future__ import annotations

import torch


def assert_as_accurate(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Both errors against the float64 answer `exact`; the band is one rounding of the largest result."""
    assert got.dtype == plain.dtype and exact.dtype == torch.float64
    assert got.shape == plain.shape == exact.shape
    error, allowed = (float((x.double() - exact).abs().max()) for x in (got, plain))
    band = torch.finfo(got.dtype).eps * float(exact.abs().max())
    assert error <= 2 * allowed + band, f"error {error:.3g}, of plain PyTorch {allowed:.3g}, band {band:.3g}"
