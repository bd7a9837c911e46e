"""Multi-scale binary residual quantisation in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastvar.random import uniform

if TYPE_CHECKING:
    from fastvar.ops.bitwise_residual_quantize import AccumulateBitsCall, BitwiseQuantizeCall


def forward(call: BitwiseQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits (B, L, d), feature map (B, d, H, W) and teacher-forcing inputs (B, L - n_1, d)."""
    schedule = call.schedule
    features = call.features.to(torch.promote_types(call.features.dtype, torch.float32)).contiguous()
    feature_map = torch.zeros_like(features)
    bits, inputs = [], [_to_rows(features[:, :, :0])]
    for k, grid in enumerate(schedule):
        rows = _to_rows(_resampled(features - feature_map, grid, "area"))  # [B, n_k, d]
        bits.append(rows > 0)
        sent = bits[k]
        if call.flip_probability is not None:
            sent = sent ^ (_noise(sent, schedule.starts[k], call.seed, call.first_image) < call.flip_probability[k])
        feature_map = feature_map + _resampled(_codes(sent, grid, features.dtype), schedule.finest, "bilinear")
        if k + 1 < len(schedule):
            inputs.append(_to_rows(_resampled(feature_map, schedule[k + 1], call.next_input)))
    return torch.cat(bits, 1), feature_map, torch.cat(inputs, 1)


def accumulate_bits(call: AccumulateBitsCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature map (B, d, H, W) with the bits (B, n_k, d) of a scale, and the next input (B, n_{k+1}, d)."""
    feature_map, compute = call.feature_map, torch.promote_types(call.feature_map.dtype, torch.float32)
    grid, following = (call.height, call.width), (call.next_height, call.next_width)
    codes = _resampled(_codes(call.bits, grid, compute), feature_map.shape[-2:], "bilinear")
    accumulated = (feature_map.to(compute) + codes).contiguous()
    finest = not all(following)
    following_map = accumulated[:, :, :0] if finest else _resampled(accumulated, following, call.next_input)
    return accumulated, _to_rows(following_map)


def _codes(bits: torch.Tensor, grid: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Bits (B, n, d) as codes of length one on their grid: +-1 / sqrt(d), (B, d, h, w)."""
    signs = bits.to(dtype) * 2 - 1
    return (signs * bits.shape[-1] ** -0.5).unflatten(1, tuple(grid)).permute(0, 3, 1, 2).contiguous()


def _noise(bits: torch.Tensor, start: int, seed: int, first_image: int) -> torch.Tensor:
    """(B, n, d) uniform numbers by seed, image, and token position * d + bit; the first token's position is `start`."""
    batch, length, depth = bits.shape
    device = bits.device
    image = torch.arange(first_image, first_image + batch, device=device)[:, None]
    counter = torch.arange(start * depth, (start + length) * depth, device=device)
    # full, not tensor: no copy from the host
    return uniform(torch.full((), seed, dtype=torch.int64, device=device), image, counter).view(bits.shape)


def _resampled(image: torch.Tensor, grid: Sequence[int], mode: str) -> torch.Tensor:
    """(B, d, H, W) at another size, by "area" or "bilinear" (align_corners False, no antialiasing)."""
    return image if image.shape[-2:] == tuple(grid) else F.interpolate(image, size=tuple(grid), mode=mode)


def _to_rows(image: torch.Tensor) -> torch.Tensor:
    """(B, d, h, w) -> (B, h w, d), contiguous and never a view."""
    return image.flatten(2).mT.clone(memory_format=torch.contiguous_format)
