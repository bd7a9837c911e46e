"""Multi-scale residual quantisation and its single step in C++, for CPUs: csrc/residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvar.schedule import ScaleSchedule

# Search in bfloat16 first, where the processor multiplies them, and decide among the codes that this leaves in float32:
# the tokens are the same.
SCREEN = True


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
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0."""
    batch, channels = features.shape[:2]
    length = schedule.num_tokens
    tokens = torch.empty(batch, length, dtype=torch.int64)
    feature_map = torch.empty(features.shape, dtype=torch.float32)
    inputs = torch.empty(batch, length - schedule.lengths[0], channels, dtype=torch.float32)
    usage = torch.zeros(len(codebook), dtype=torch.int64)
    if not channels:
        usage[0] = tokens.numel()
        return tokens.zero_(), feature_map, inputs, usage
    torch.ops.fastvar_cpu.residual_quantize.default(
        _float32(features), _float32(codebook), _float32(phi_weight), _float32(phi_bias), phi_ratio, phi_index,
        schedule.flat, znorm, SCREEN, tokens, feature_map, inputs, usage,
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
    """See the reference."""
    batch, channels = feature_map.shape[:2]
    accumulated = torch.empty(feature_map.shape, dtype=torch.float32)
    inputs = torch.empty(batch, next_height * next_width, channels, dtype=torch.float32)
    if accumulated.numel():
        torch.ops.fastvar_cpu.accumulate_scale.default(
            _float32(feature_map), tokens.to(torch.int64).contiguous(), _float32(codebook), _float32(phi_weight),
            _float32(phi_bias), phi_ratio, height, width, next_height, next_width, accumulated, inputs,
        )  # fmt: skip
    return accumulated, inputs


def accumulate_scale_backward(
    grads: Sequence[torch.Tensor | None],
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
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of feature_map, codebook, phi_weight and phi_bias, as far as they are needed."""
    leaves = (feature_map, None, codebook, phi_weight, phi_bias)
    found = [
        torch.empty(leaf.shape, dtype=torch.float32) if need and leaf is not None else None
        for leaf, need in zip(leaves, needs, strict=True)
    ]
    if feature_map.numel():
        grids = [height, width, next_height, next_width, *feature_map.shape[-2:]]
        torch.ops.fastvar_cpu.accumulate_scale_backward.default(
            _float32(grads[0]), _float32(grads[1]), tokens.to(torch.int64).contiguous(), _float32(codebook),
            _float32(phi_weight), _float32(phi_bias), phi_ratio, grids, found[0], *found[2:],
        )  # fmt: skip
    else:
        found = [None if g is None else g.zero_() for g in found]
    return [g.to(leaf.dtype) for g, leaf in zip(found, leaves, strict=True) if g is not None and leaf is not None]


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
