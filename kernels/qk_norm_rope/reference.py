"""L2-normalised queries and keys with rotary positions in plain PyTorch: the specification."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall

MAX_LOG_SCALE = math.log(100.0)


def forward(call: QKNormRopeCall | IntoCacheCall) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of the same shape."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    q, k = call.q.to(compute), call.k.to(compute)
    if call.log_scale is not None:
        scale = call.log_scale.to(compute).clamp(max=MAX_LOG_SCALE).exp()[:, None]  # [H, 1]
        q = q * (scale / q.norm(dim=-1, keepdim=True).clamp(min=call.eps))
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=call.eps)
    if call.rope is not None:
        cos, sin = (table.to(compute)[:, None] for table in call.rope)  # [L, 1, D/2]
        q, k = (torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
                for a, b in ((x[..., 0::2], x[..., 1::2]) for x in (q, k)))  # fmt: skip
    q, k = (x.to(call.q.dtype, copy=True, memory_format=torch.contiguous_format) for x in (q, k))
    return q, k


def into_cache(call: IntoCacheCall) -> torch.Tensor:
    """q; keys and values are written to rows position : position + n of the caches (B, capacity, H, D)."""
    q, k = forward(call)
    call.key_cache.narrow(1, call.position, k.shape[1]).copy_(k)
    call.value_cache.narrow(1, call.position, k.shape[1]).copy_(call.v)
    return q
