"""Multi-scale residual quantisation and its single step in C++, for CPUs: csrc/residual_quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from fastvar.kernels.residual_quantize.extension import accumulated, convolution, float32, quantized

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall

# Search in bfloat16 first, where the processor multiplies them, and decide among the codes that this leaves in float32:
# the tokens are the same.
SCREEN = True


def forward(call: QuantizeCall) -> tuple[torch.Tensor, ...]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0."""
    return quantized(torch.ops.fastvar_cpu.residual_quantize.default, call, SCREEN)


def accumulate_scale(call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    return accumulated(torch.ops.fastvar_cpu.accumulate_scale.default, call)


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
            float32(grads[0]), float32(grads[1]), call.tokens.to(torch.int64).contiguous(), float32(call.codebook),
            *convolution(call.phi), grids,
            *(made.get(name) for name in ("feature_map", "codebook", "phi_weight", "phi_bias")),
        )  # fmt: skip
    else:
        for gradient in made.values():
            gradient.zero_()
    return {name: gradient.to(leaves[name].dtype) for name, gradient in made.items()}
