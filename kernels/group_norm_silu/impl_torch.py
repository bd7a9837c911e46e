"""Group norm and SiLU for CPUs: PyTorch's fused kernels, SiLU in place, and the gradient written out.

An image (B, C, N, 1) in the channels-last format is what PyTorch normalises as it lies, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.group_norm_silu import GroupNormCall


def forward(call: GroupNormCall) -> torch.Tensor:
    """See the reference."""
    out = _norm(call, _image(call))[0]
    out = F.silu(out, inplace=True) if call.silu else out
    return _rows(out).to(call.x.dtype).contiguous()


def backward(
    call: GroupNormCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of x, weight, bias and shift, as far as they are needed."""
    (grad,) = grads
    assert grad is not None
    image = _image(call)
    normed, mean, rstd = _norm(call, image)
    slope = _channels_last(grad.to(image.dtype))
    if call.silu:
        slope = torch.ops.aten.silu_backward(slope, normed)
    batch, channels, length, _ = image.shape
    of_image, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        slope, image, mean, rstd, call.weight.to(image.dtype), batch, channels, length, call.groups,
        (needs.x or needs.shift, needs.weight, needs.bias),
    )  # fmt: skip
    gradients: dict[str, torch.Tensor] = {}
    if needs.x:
        gradients["x"] = _rows(of_image).to(call.x.dtype).contiguous()
    if needs.weight:
        gradients["weight"] = of_weight.to(call.weight.dtype)
    if needs.bias:
        gradients["bias"] = of_bias.to(call.bias.dtype)
    if needs.shift and call.shift is not None:
        gradients["shift"] = _rows(of_image).sum((0, 1)).to(call.shift.dtype)
    return gradients


def _image(call: GroupNormCall) -> torch.Tensor:
    """x + shift as (B, C, N, 1), in the channels-last format."""
    compute = torch.promote_types(call.x.dtype, torch.float32)
    rows = call.x.to(compute)
    rows = rows if call.shift is None else rows + call.shift.to(compute)
    return _channels_last(rows)


def _channels_last(rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, N, C) as (B, C, N, 1). The last dimension has the stride that the format asks for: PyTorch 2.11 takes no
    other."""
    return rows.contiguous()[:, :, None].permute(0, 3, 1, 2)


def _norm(call: GroupNormCall, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm, and the means and inverse deviations of the groups."""
    batch, channels, length, _ = image.shape
    weight, bias = call.weight.to(image.dtype), call.bias.to(image.dtype)
    return torch.native_group_norm(image, weight, bias, batch, channels, length, call.groups, call.eps)


def _rows(image: torch.Tensor) -> torch.Tensor:
    """(B, C, N, 1) as (B, N, C)."""
    return image[..., 0].mT
