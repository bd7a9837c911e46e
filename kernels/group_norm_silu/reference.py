"""Group norm and SiLU over rows of channels in plain PyTorch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.group_norm_silu import GroupNormCall


def forward(call: GroupNormCall) -> torch.Tensor:
    """SiLU(GroupNorm(x + shift))."""
    compute = torch.promote_types(call.x.dtype, torch.float32)
    rows = call.x.to(compute)
    if call.shift is not None:
        rows = rows + call.shift.to(compute)
    images = rows.mT[..., None]  # (B, C, N, 1) in channels-last, which PyTorch normalises as it lies
    out = torch.group_norm(images, call.groups, call.weight.to(compute), call.bias.to(compute), call.eps)
    out = F.silu(out) if call.silu else out
    return out[..., 0].mT.to(call.x.dtype).contiguous()
