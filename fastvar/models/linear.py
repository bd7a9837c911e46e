"""Linear layers whose inference goes straight to oneDNN on CPUs, and to cuBLASLt with its GELU on GPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """An nn.Linear that multiplies by `linear`; a bias given in the call takes the place of its own."""

    def forward(self, input: torch.Tensor, *, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
        return linear(input, self.weight, self.bias if bias is None else bias, gelu=gelu)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False) -> torch.Tensor:
    """x weight^T + bias, and its GELU (tanh approximation) if asked for.

    On CPUs without gradient this is oneDNN's product with the GELU in its epilogue. PyTorch itself asks MKL for float32
    products, which on AMD processors takes longer, most of all for the few rows of the coarse scales.
    `torch.backends.mkldnn.enabled` switches it off. On GPUs without gradient and autocast the GELU is in the epilogue
    of cuBLASLt, which sees the product before it is rounded.

    Args:
        x: (..., K); weight: (N, K); bias: (N,) or None.
        gelu: whether to apply the GELU.
    """
    if _to_onednn(x, weight):
        name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
    if gelu and bias is not None and _to_epilogue(x, weight):
        # On CUDA, and only there, this GELU is the tanh approximation.
        out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], weight.shape[0])
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def _to_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == weight.dtype and x.dtype in _onednn_dtypes() and x.numel() > 0


def _to_epilogue(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type != "cuda" or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return x.dtype == weight.dtype and x.numel() > 0 and hasattr(torch, "_addmm_activation")


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes in which this processor multiplies with oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)
