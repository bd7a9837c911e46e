"""Multi-scale residual quantisation and its single step in CUDA: csrc/residual_quantize."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fastvar.kernels.residual_quantize.extension import accumulated, quantized
from fastvar.kernels.residual_quantize.gradients import accumulate_scale_backward

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall

__all__ = ["accumulate_scale", "accumulate_scale_backward", "forward"]


def forward(call: QuantizeCall) -> tuple[torch.Tensor, ...]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0. The
    convolutions are in float32, whatever the setting of TF32."""
    return quantized(torch.ops.fastvar_cuda.residual_quantize.default, call)


def accumulate_scale(call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. A token that does not exist stands for the first or the last code: nothing waits for an error
    here."""
    return accumulated(torch.ops.fastvar_cuda.accumulate_scale.default, call)
