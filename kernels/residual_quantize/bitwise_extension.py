"""Multi-scale binary residual quantisation and its single step in C++ and CUDA, which give the same bits:
csrc/bitwise_residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.bitwise_residual_quantize import AccumulateBitsCall, BitwiseQuantizeCall


def forward(call: BitwiseQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. What is not a number gives a bit of 0; all sums are in float32."""
    features, schedule, flips = call.features.to(torch.float32).contiguous(), call.schedule, call.flip_probability
    batch, depth = features.shape[:2]
    flips = features.new_empty(0) if flips is None else flips.to(torch.float32).contiguous()
    bits = features.new_empty(batch, schedule.num_tokens, depth, dtype=torch.bool)
    feature_map = features.new_empty(features.shape)
    inputs = features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], depth)
    _library(features).bitwise_residual_quantize.default(
        features, flips, schedule.flat, call.next_input == "area", call.seed, call.first_image,
        bits, feature_map, inputs,
    )  # fmt: skip
    return bits, feature_map, inputs


def accumulate_bits(call: AccumulateBitsCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    feature_map = call.feature_map.to(torch.float32).contiguous()
    grids = (call.height, call.width, call.next_height, call.next_width)
    batch, depth = feature_map.shape[:2]
    accumulated = feature_map.new_empty(feature_map.shape)
    following = feature_map.new_empty(batch, call.next_height * call.next_width, depth)
    _library(feature_map).accumulate_bits.default(
        feature_map, call.bits.contiguous(), *grids, call.next_input == "area", accumulated, following
    )
    return accumulated, following


def accumulate_bits_backward(
    call: AccumulateBitsCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """The gradient of the feature map, through products with the matrices of both axes: their sums have an order. They
    are in float64, as a setting of the process can turn products in float32 into ones of fewer digits (TF32)."""
    grad, following = grads
    feature_map, next_grid = call.feature_map, (call.next_height, call.next_width)
    if grad is None:
        gradient = torch.zeros(feature_map.shape, dtype=torch.float32, device=feature_map.device)
    else:  # a copy, as it is added to
        gradient = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if following is not None and following.shape[1]:
        image = following.to(torch.float64).mT.unflatten(2, next_grid)  # [B, d, h', w']
        rows, columns = (
            _axis(size, out, call.next_input, image)
            for size, out in zip(feature_map.shape[-2:], next_grid, strict=True)
        )
        gradient += rows.T @ image @ columns
    return {"feature_map": gradient.to(feature_map.dtype)}


def _axis(size: int, out: int, mode: str, like: torch.Tensor) -> torch.Tensor:
    """(out, size): what each of `size` cells adds to each of `out`."""
    cells = torch.eye(size, dtype=like.dtype, device=like.device)
    return cells if size == out else F.interpolate(cells[None, :, None, :], size=(1, out), mode=mode)[0, :, 0].T


def _library(tensor: torch.Tensor) -> Any:
    return torch.ops.fastvar_cuda if tensor.is_cuda else torch.ops.fastvar_cpu
