"""Block-causal attention scale by scale in plain PyTorch: the specification.

Each scale's queries see one rectangle of keys, so scaled_dot_product_attention needs no mask and nothing that is masked
is ever computed. Only a ragged prefix needs a mask, over its own columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvar.schedule import ScaleSchedule


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    softmax_scale: float,
    block_diagonal: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v (B, L, H, D); prefix_k, prefix_v (B/G, P, H, D); prefix_lengths (B/G,). Returns (B, L, H, D) and the
    log-sum-exp of the scores (B, H, L), or nothing (0,) in its place."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "cpu":
        # float32 inside: the CPU's backward in bfloat16 takes six times as long
        q, k, v = (tensor.to(compute) for tensor in (q, k, v))
        prefix_k, prefix_v = (None if t is None else t.to(q.dtype) for t in (prefix_k, prefix_v))
    prefix, visible = 0, None
    if prefix_k is not None and prefix_v is not None:
        prefix, group = prefix_k.shape[1], q.shape[0] // max(prefix_k.shape[0], 1)
        k = torch.cat([prefix_k.repeat_interleave(group, 0), k], 1)
        v = torch.cat([prefix_v.repeat_interleave(group, 0), v], 1)
        if prefix_lengths is not None:
            # [B, 1, 1, P + L]: the prefix up to its length, and all of the image
            column = torch.arange(k.shape[1], device=k.device)
            lengths = prefix_lengths.repeat_interleave(group)[:, None]
            visible = ((column < lengths) | (column >= prefix))[:, None, None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, ., D]
    outputs, sums = [], []
    for start, end in zip(schedule.starts, schedule.ends, strict=True):
        keys = [slice(0, prefix + end)]
        if block_diagonal:
            keys = [slice(0, prefix), slice(prefix + start, prefix + end)]

        def rows(tensor: torch.Tensor, dim: int, keys: list[slice] = keys) -> torch.Tensor:
            parts = [tensor.narrow(dim, s.start, s.stop - s.start) for s in keys]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                rows(k, 2),
                rows(v, 2),
                attn_mask=None if visible is None else rows(visible, 3),
                scale=softmax_scale,
            ).transpose(1, 2)
        )
        if with_lse:
            scores = q[:, :, start:end].to(compute) @ rows(k, 2).to(compute).mT * softmax_scale
            hidden = None if visible is None else ~rows(visible, 3)
            sums.append((scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).logsumexp(-1))
    lse = torch.cat(sums, 2) if with_lse else torch.empty(0, dtype=compute, device=q.device)
    return torch.cat(outputs, 1).to(dtype), lse
