"""Multi-scale binary residual quantisation and its single step in C++ and CUDA, which give the same bits:
csrc/bitwise_residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastvar.schedule import ScaleSchedule


def forward(
    features: torch.Tensor,
    flip_probability: torch.Tensor | None,
    schedule: ScaleSchedule,
    next_input: str,
    seed: int,
    first_image: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. What is not a number gives a bit of 0; all sums are in float32."""
    features = features.to(torch.float32).contiguous()
    batch, depth = features.shape[:2]
    if flip_probability is None:
        flip_probability = features.new_empty(0)
    bits = features.new_empty(batch, schedule.num_tokens, depth, dtype=torch.bool)
    feature_map = features.new_empty(features.shape)
    inputs = features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], depth)
    _library(features).bitwise_residual_quantize.default(
        features, flip_probability.to(torch.float32).contiguous(), schedule.flat, next_input == "area", seed,
        first_image, bits, feature_map, inputs,
    )  # fmt: skip
    return bits, feature_map, inputs


def accumulate_bits(
    feature_map: torch.Tensor,
    bits: torch.Tensor,
    height: int,
    width: int,
    next_height: int,
    next_width: int,
    next_input: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    feature_map = feature_map.to(torch.float32).contiguous()
    batch, depth = feature_map.shape[:2]
    accumulated = feature_map.new_empty(feature_map.shape)
    following = feature_map.new_empty(batch, next_height * next_width, depth)
    _library(feature_map).accumulate_bits.default(
        feature_map, bits.contiguous(), height, width, next_height, next_width, next_input == "area", accumulated,
        following,
    )  # fmt: skip
    return accumulated, following


def accumulate_bits_backward(
    grads: Sequence[torch.Tensor | None],
    feature_map: torch.Tensor,
    bits: torch.Tensor,
    height: int,
    width: int,
    next_height: int,
    next_width: int,
    next_input: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradient of the feature map, through products with the matrices of both axes: their sums have an order. They
    are in float64, as a setting of the process can turn products in float32 into ones of fewer digits (TF32)."""
    if not needs[0]:
        return []
    grad, following = grads
    if grad is None:
        found = torch.zeros(feature_map.shape, dtype=torch.float32, device=feature_map.device)
    else:  # a copy: results of an operator may not be its arguments
        found = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if following is not None and following.shape[1]:
        image = following.to(torch.float64).mT.unflatten(2, (next_height, next_width))  # [B, d, h', w']
        rows, columns = (
            _axis(size, out, next_input, image)
            for size, out in zip(feature_map.shape[-2:], (next_height, next_width), strict=True)
        )
        found += rows.T @ image @ columns
    return [found.to(feature_map.dtype)]


def _axis(size: int, out: int, mode: str, like: torch.Tensor) -> torch.Tensor:
    """(out, size): what each of `size` cells adds to each of `out`."""
    cells = torch.eye(size, dtype=like.dtype, device=like.device)
    return cells if size == out else F.interpolate(cells[None, :, None, :], size=(1, out), mode=mode)[0, :, 0].T


def _library(tensor: torch.Tensor) -> Any:
    return torch.ops.fastvar_cuda if tensor.is_cuda else torch.ops.fastvar_cpu
