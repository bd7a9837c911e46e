"""Group norm in Triton: inputs whose statistics are hard to sum."""

from __future__ import annotations

import pytest
import torch
from fastvar.kernels.group_norm_silu import impl_triton

from fastvar.ops import group_norm_silu
from tests.helpers.samples import noise
from tests.interpreted.test_kernels import check

NAMES = ("x", "weight", "bias", "shift")


def arguments(x: torch.Tensor) -> dict[str, torch.Tensor | int]:
    weight, bias, shift = noise(3, x.shape[2], seed=1)
    return {"x": x, "weight": weight, "bias": bias, "shift": shift, "groups": 2}


@pytest.mark.parametrize(("row", "size"), [(0, 30), (1, 3000), (70, 100), (1499, 3000)])
def test_an_outlier(row: int, size: int) -> None:
    x = noise(1, 1500, 64)
    x[:, row] *= size
    check(group_norm_silu, arguments(x), NAMES)


@pytest.mark.parametrize("length", [1, 33, 1030])  # up to five parts
def test_large_means_and_parts_that_differ(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl_triton, "LONG", 1)
    x = noise(2, length, 12)
    check(group_norm_silu, arguments(x + 1000), NAMES)
    check(group_norm_silu, arguments(x + 50 * noise(12, seed=4)), NAMES)
    check(group_norm_silu, arguments(x + torch.linspace(-100, 100, length)[:, None]), NAMES)


def test_the_gradient_of_the_shift_is_not_rounded_with_that_of_x() -> None:
    """As the reference sums it, in float32, and also where no gradient of x is asked for."""
    x = noise(1, 4000, 12).half()
    values = arguments(x)
    check(group_norm_silu, values, ("shift",))
    found = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        leaf = noise(3, 12, seed=1)[2].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        result = group_norm_silu(**{**values, "x": x.to(dtype), "shift": leaf}, backend=backend)
        found += torch.autograd.grad((result * noise(4000, 12, seed=5)).sum(), leaf)
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=2e-2)
