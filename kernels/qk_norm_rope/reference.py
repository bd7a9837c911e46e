"""L2-normalised queries and keys with rotary positions in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch

MAX_LOG_SCALE = math.log(100.0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (B, L, H, D), log_scale (H,), rope_cos and rope_sin (L, D/2). Returns q, k of the same shape."""
    compute = torch.promote_types(q.dtype, torch.float32)
    q_out, k_out = q.to(compute), k.to(compute)
    if log_scale is not None:
        scale = log_scale.to(compute).clamp(max=MAX_LOG_SCALE).exp()[:, None]  # [H, 1]
        q_out = q_out * (scale / q_out.norm(dim=-1, keepdim=True).clamp(min=eps))
        k_out = k_out / k_out.norm(dim=-1, keepdim=True).clamp(min=eps)
    if rope_cos is not None and rope_sin is not None:
        cos, sin = rope_cos.to(compute)[:, None], rope_sin.to(compute)[:, None]  # [L, 1, D/2]
        q_out, k_out = _rotate(q_out, cos, sin), _rotate(k_out, cos, sin)
    return _fresh(q_out, q), _fresh(k_out, k)


def into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: int,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """As `forward`; keys and values are written to rows position : position + n of the caches (B, capacity, H, D)."""
    q_out, k_out = forward(q, k, log_scale, rope_cos, rope_sin, eps)
    key_cache.narrow(1, position, q.shape[1]).copy_(k_out)
    value_cache.narrow(1, position, q.shape[1]).copy_(v)
    return q_out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]  # pairs (x_2i, x_2i+1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _fresh(out: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    out = out.to(given.dtype).contiguous()
    return out.clone() if out.data_ptr() == given.data_ptr() else out
