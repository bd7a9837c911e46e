"""Block-causal attention in plain PyTorch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The result (B, L, H, D) and the log-sum-exp of the scores (B, H, L)."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (t.to(compute).transpose(1, 2) for t in (call.q, call.k, call.v))  # [B, H, L, D]
    batch, length = call.q.shape[:2]
    seen = torch.zeros(length, length, dtype=torch.bool, device=q.device)
    for start, end in zip(call.schedule.starts, call.schedule.ends, strict=True):
        seen[start:end, start if call.block_diagonal else 0 : end].fill_(True)
    seen = seen.expand(batch, 1, -1, -1)
    if call.prefix is not None:
        rows, tokens = call.prefix.k.shape[:2]
        group = batch // max(rows, 1)
        prefix_k, prefix_v = (t.to(compute).transpose(1, 2).repeat_interleave(group, 0) for t in call.prefix[:2])
        k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
        if call.prefix.lengths is not None:
            column = torch.arange(tokens, device=q.device)
            valid = column < call.prefix.lengths.repeat_interleave(group)[:, None]
        seen = torch.cat([valid[:, None, None].expand(-1, 1, length, -1), seen], 3)  # [B, 1, L, P + L]
    scores = (q @ k.mT * call.softmax_scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.transpose(1, 2).to(call.q.dtype).contiguous(), lse
