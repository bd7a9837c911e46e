"""group_norm_silu against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops import group_norm_silu
from tests.helpers.samples import noise

SHAPES = [(2, 6, 8, 4), (1, 64, 160, 32), (3, 1, 10, 5), (2, 9, 12, 1)]


def defined(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    parts = x.double().unflatten(2, (groups, -1))  # [B, N, groups, C / groups]
    centred = parts - parts.mean((1, 3), keepdim=True)
    normed = centred / (centred.square().mean((1, 3), keepdim=True) + eps).sqrt()
    return normed.flatten(2) * weight.double() + bias.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
def test_definition(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    """Also with a norm in float32, as autocast has it; what is added to x before counts."""
    *size, groups = shape
    x, (weight, bias, shift) = noise(*size, dtype=dtype), noise(3, size[2])
    for added in (None, shift):
        found = group_norm_silu(x, weight, bias, groups=groups, eps=1e-5, shift=added, silu=silu)
        moved = x.double() if added is None else x.double() + added.double()
        expected = defined(moved, weight, bias, groups, 1e-5)
        expected = F.silu(expected) if silu else expected
        assert found.dtype == dtype and found.is_contiguous()
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = 64 * eps * (1 + expected.abs()) + torch.finfo(dtype).eps * expected.abs()
        assert ((found.double() - expected).abs() <= bound).all()


def test_an_image_that_lies_channels_last() -> None:
    image = noise(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    weight, bias = noise(2, 8)
    rows = group_norm_silu(image.permute(0, 2, 3, 1).flatten(1, 2), weight, bias, groups=4)
    expected = F.silu(F.group_norm(image, 4, weight, bias, 1e-6))
    torch.testing.assert_close(rows.unflatten(1, (5, 3)).permute(0, 3, 1, 2), expected)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, (weight, bias) = noise(3, 50, 16), noise(2, 16)
    together = group_norm_silu(x, weight, bias, groups=4)
    for i in range(3):
        assert torch.equal(group_norm_silu(x[i : i + 1], weight, bias, groups=4)[0], together[i])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"x: expected shape \(B, N, C\)", {"x": noise(2, 8)}),
        ("x: expected a floating-point tensor", {"x": torch.ones(2, 3, 8, dtype=torch.int64)}),
        ("groups: expected a divisor of 8 channels, got 3", {"groups": 3}),
        ("groups: expected a divisor of 8 channels, got 0", {"groups": 0}),
        (r"weight: expected shape \(8\)", {"weight": noise(4)}),
        (r"shift: expected shape \(8\)", {"shift": noise(2, 8)}),
        ("bias: expected cpu as x, got meta", {"bias": torch.empty(8, device="meta")}),
    ],
)
def test_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    valid: dict[str, Any] = {"x": noise(2, 3, 8), "weight": noise(8), "bias": noise(8), "groups": 4}
    with pytest.raises(ValueError, match=f"^group_norm_silu: {message}"):
        group_norm_silu(**{**valid, **change})
