"""What the quantiser in C++ and the one in CUDA are called with: room for the results, and tensors of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall, ResidualConv, ScaleConv


def quantized(op: Callable[..., Any], call: QuantizeCall, *settings: Any) -> tuple[torch.Tensor, ...]:
    """Tokens, feature map, inputs and usage; `op` also takes settings of its own, behind those of the call."""
    features, schedule = call.features, call.schedule
    batch, channels = features.shape[:2]
    tokens = features.new_empty(batch, schedule.num_tokens, dtype=torch.int64)
    feature_map = features.new_empty(features.shape, dtype=torch.float32)
    inputs = features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], channels, dtype=torch.float32)
    usage = features.new_zeros(len(call.codebook), dtype=torch.int64)
    index = () if call.phi is None else call.phi.index
    if channels:
        op(
            float32(features), float32(call.codebook), *convolution(call.phi), index, schedule.flat, call.znorm,
            *settings, tokens, feature_map, inputs, usage,
        )  # fmt: skip
    else:
        usage[0] = tokens.zero_().numel()
    return tokens, feature_map, inputs, usage


def accumulated(op: Callable[..., Any], call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature map with one more scale, and the inputs of the next one."""
    feature_map, grids = call.feature_map, (call.height, call.width, call.next_height, call.next_width)
    result = feature_map.new_empty(feature_map.shape, dtype=torch.float32)
    size = (len(feature_map), call.next_height * call.next_width, feature_map.shape[1])
    inputs = feature_map.new_empty(size, dtype=torch.float32)
    if result.numel():
        op(
            float32(feature_map), call.tokens.to(torch.int64).contiguous(), float32(call.codebook),
            *convolution(call.phi), *grids, result, inputs,
        )  # fmt: skip
    return result, inputs


def convolution(
    phi: ResidualConv | ScaleConv | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Weight, bias and ratio of a residual convolution."""
    return (None, None, 0.0) if phi is None else (float32(phi.weight), float32(phi.bias), phi.ratio)


def float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous and in float32."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
