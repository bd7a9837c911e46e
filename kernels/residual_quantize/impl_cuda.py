"""Multi-scale residual quantisation and its single step in CUDA: csrc/residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastvar.kernels.residual_quantize.gradients import accumulate_scale_backward

from fastvar.schedule import ScaleSchedule

__all__ = ["accumulate_scale", "accumulate_scale_backward", "forward"]


def forward(
    features: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    phi_index: Sequence[int],
    schedule: ScaleSchedule,
    znorm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0. The
    convolutions are in float32, whatever the setting of TF32."""
    batch, channels = features.shape[:2]
    length, device = schedule.num_tokens, features.device
    tokens = torch.empty(batch, length, dtype=torch.int64, device=device)
    feature_map = torch.empty(features.shape, dtype=torch.float32, device=device)
    inputs = torch.empty(batch, length - schedule.lengths[0], channels, dtype=torch.float32, device=device)
    usage = torch.zeros(len(codebook), dtype=torch.int64, device=device)
    if not channels:
        usage[0] = tokens.numel()
        return tokens.zero_(), feature_map, inputs, usage
    torch.ops.fastvar_cuda.residual_quantize.default(
        _float32(features), _float32(codebook), _float32(phi_weight), _float32(phi_bias), phi_ratio, phi_index,
        schedule.flat, znorm, tokens, feature_map, inputs, usage,
    )  # fmt: skip
    return tokens, feature_map, inputs, usage


def accumulate_scale(
    feature_map: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    height: int,
    width: int,
    next_height: int,
    next_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. A token that does not exist stands for the first or the last code: nothing waits for an error
    here."""
    batch, channels = feature_map.shape[:2]
    accumulated = torch.empty(feature_map.shape, dtype=torch.float32, device=feature_map.device)
    inputs = torch.empty(batch, next_height * next_width, channels, dtype=torch.float32, device=feature_map.device)
    if accumulated.numel():
        torch.ops.fastvar_cuda.accumulate_scale.default(
            _float32(feature_map), tokens.to(torch.int64).contiguous(), _float32(codebook), _float32(phi_weight),
            _float32(phi_bias), phi_ratio, height, width, next_height, next_width, accumulated, inputs,
        )  # fmt: skip
    return accumulated, inputs


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
