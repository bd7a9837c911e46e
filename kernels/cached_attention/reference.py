"""Attention of new queries to a cache in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    trunk_k: torch.Tensor | None,
    trunk_v: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """q (B, n, H, D), k and v (B, S, H, D); prefix (B/G, P, H, D), trunk (B/F, T, H, D). Returns (B, n, H, D)."""
    batch = q.shape[0]
    visible = None
    keys, values = [k], [v]
    if trunk_k is not None and trunk_v is not None:
        keys.insert(0, _shared(trunk_k, batch))
        values.insert(0, _shared(trunk_v, batch))
    if prefix_k is not None and prefix_v is not None:
        keys.insert(0, _shared(prefix_k, batch))
        values.insert(0, _shared(prefix_v, batch))
        if prefix_lengths is not None:
            # [B, 1, 1, P + T + S]: the prefix up to its length, and everything after it
            column = torch.arange(sum(part.shape[1] for part in keys), device=k.device)
            lengths = _shared(prefix_lengths, batch)[:, None]
            visible = ((column < lengths) | (column >= prefix_k.shape[1]))[:, None, None]
    k = keys[0] if len(keys) == 1 else torch.cat(keys, 1)
    v = values[0] if len(values) == 1 else torch.cat(values, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=softmax_scale
    )
    return out.transpose(1, 2).contiguous()


def _shared(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return tensor.repeat_interleave(batch // max(tensor.shape[0], 1), 0)
