"""Adaptive layer norm and gated residual in plain PyTorch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.adaptive_layer_norm import GateCall, GateNormCall, NormCall


def norm(call: NormCall) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift."""
    compute = torch.promote_types(call.x.dtype, torch.float32)
    normed = F.layer_norm(call.x.to(compute), call.x.shape[-1:], eps=call.eps)
    out = normed * (1 + call.scale.to(compute)[:, None]) + call.shift.to(compute)[:, None]
    return out.to(call.x.dtype).contiguous()


def gate(call: GateCall) -> torch.Tensor:
    """x + gate y."""
    compute = torch.promote_types(call.x.dtype, torch.float32)
    out = call.x.to(compute) + call.gate.to(compute)[:, None] * call.y.to(compute)
    return out.to(call.x.dtype).contiguous()


def gate_norm(call: GateNormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual x + gate y in x's dtype, and its norm."""
    stream = gate(call)
    return stream, norm(call._replace(x=stream))
