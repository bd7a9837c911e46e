"""Multi-scale residual quantisation and its single step in C++, for CPUs: csrc/residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall, ResidualConv, ScaleConv

# Search in bfloat16 first, where the processor multiplies them, and decide among the codes that this leaves in float32:
# the tokens are the same.
SCREEN = True


def forward(call: QuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0."""
    features, schedule = call.features, call.schedule
    batch, channels = features.shape[:2]
    tokens = features.new_empty(batch, schedule.num_tokens, dtype=torch.int64)
    feature_map = features.new_empty(features.shape, dtype=torch.float32)
    inputs = features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], channels, dtype=torch.float32)
    usage = features.new_zeros(len(call.codebook), dtype=torch.int64)
    if not channels:
        usage[0] = tokens.numel()
        return tokens.zero_(), feature_map, inputs, usage
    torch.ops.fastvar_cpu.residual_quantize.default(
        _float32(features), _float32(call.codebook), *_phi(call.phi), () if call.phi is None else call.phi.index,
        schedule.flat, call.znorm, SCREEN, tokens, feature_map, inputs, usage,
    )  # fmt: skip
    return tokens, feature_map, inputs, usage


def accumulate_scale(call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    feature_map, grids = call.feature_map, (call.height, call.width, call.next_height, call.next_width)
    accumulated = feature_map.new_empty(feature_map.shape, dtype=torch.float32)
    inputs = feature_map.new_empty(
        len(feature_map), call.next_height * call.next_width, feature_map.shape[1], dtype=torch.float32
    )
    if accumulated.numel():
        torch.ops.fastvar_cpu.accumulate_scale.default(
            _float32(feature_map), call.tokens.to(torch.int64).contiguous(), _float32(call.codebook),
            *_phi(call.phi), *grids, accumulated, inputs,
        )  # fmt: skip
    return accumulated, inputs


def accumulate_scale_backward(
    call: AccumulateCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of feature_map, codebook, phi.weight and phi.bias, as far as they are needed."""
    leaves = {"feature_map": call.feature_map, "codebook": call.codebook}
    if call.phi is not None:
        leaves |= {"phi_weight": call.phi.weight, "phi_bias": call.phi.bias}
    made = {n: torch.empty(leaf.shape, dtype=torch.float32) for n, leaf in leaves.items() if getattr(needs, n)}
    if call.feature_map.numel():
        grids = [call.height, call.width, call.next_height, call.next_width, *call.feature_map.shape[-2:]]
        torch.ops.fastvar_cpu.accumulate_scale_backward.default(
            _float32(grads[0]), _float32(grads[1]), call.tokens.to(torch.int64).contiguous(), _float32(call.codebook),
            *_phi(call.phi), grids,
            *(made.get(name) for name in ("feature_map", "codebook", "phi_weight", "phi_bias")),
        )  # fmt: skip
    else:
        for gradient in made.values():
            gradient.zero_()
    return {name: gradient.to(leaves[name].dtype) for name, gradient in made.items()}


def _phi(phi: ResidualConv | ScaleConv | None) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """As the extension takes it: weight, bias and ratio."""
    return (None, None, 0.0) if phi is None else (_float32(phi.weight), _float32(phi.bias), phi.ratio)


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
