"""Adaptive layer norm and gated residual in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F


def forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift; x (B, L, C), scale and shift (B, C)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute), x.shape[-1:], eps=eps)
    out = torch.addcmul(shift.to(compute)[:, None], normed, scale.to(compute)[:, None] + 1)
    return out.to(x.dtype)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate y; x and y (B, L, C), gate (B, C)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.addcmul(x.to(compute), y.to(compute), gate.to(compute)[:, None])
    return out.to(x.dtype).contiguous()


def gated_residual_norm(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual x + gate y in x's dtype, and its norm."""
    stream = gated_residual(x, y, gate)
    return stream, forward(stream, scale, shift, eps)
