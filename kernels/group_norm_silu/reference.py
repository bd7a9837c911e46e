"""Group norm and SiLU over rows of channels in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + shift)); x (B, N, C), weight, bias and shift (C,)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(compute)
    if shift is not None:
        rows = rows + shift.to(compute)
    images = rows.mT[..., None]  # (B, C, N, 1) in channels-last, which PyTorch normalises as it lies
    out = torch.group_norm(images, groups, weight.to(compute), bias.to(compute), eps)
    out = F.silu(out) if silu else out
    return out[..., 0].mT.to(x.dtype).contiguous()
