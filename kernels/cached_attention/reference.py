"""Attention of new queries to a cache in plain PyTorch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastvar.ops.cached_attention import CachedAttentionCall


def forward(call: CachedAttentionCall) -> torch.Tensor:
    """The result (B, n, H, D)."""
    batch, compute = call.q.shape[0], torch.promote_types(call.q.dtype, torch.float32)
    keys, values, seen = [], [], []
    for k, v, lengths in call.parts:
        times = batch // max(k.shape[0], 1)
        keys.append(k.to(compute).repeat_interleave(times, 0))
        values.append(v.to(compute).repeat_interleave(times, 0))
        visible = torch.ones(batch, k.shape[1], dtype=torch.bool, device=k.device)
        if lengths is not None:
            visible = torch.arange(k.shape[1], device=k.device) < lengths.repeat_interleave(times)[:, None]
        seen.append(visible)
    scores = torch.einsum("bqhd,bkhd->bhqk", call.q.to(compute), torch.cat(keys, 1)) * call.softmax_scale
    weights = scores.masked_fill(~torch.cat(seen, 1)[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat(values, 1)).to(call.q.dtype).contiguous()
