"""Attention of new queries to a cache for CPUs: PyTorch's flash attention to each of the three parts.

The queries of the rows that share a part are the rows of one matrix, so that nothing shared is copied; the parts are
merged by log-sum-exp. Only of few keys a copy for every row costs less.
"""

from __future__ import annotations

import torch

FEW = 256  # keys of a row that are copied rather than merged
_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    """See the reference."""
    if not q.numel():
        return torch.empty(q.shape, dtype=q.dtype)
    shared = [
        (keys, values, lengths)
        for keys, values, lengths in ((prefix_k, prefix_v, prefix_lengths), (trunk_k, trunk_v, None))
        if keys is not None and values is not None and keys.shape[1]
    ]
    if not shared:
        return _attend(q, k, v, softmax_scale)[0].contiguous()
    if prefix_lengths is None and k.shape[1] + sum(keys.shape[1] for keys, _, _ in shared) <= FEW:
        k, v = (
            torch.cat([*(part[i].repeat_interleave(len(q) // len(part[i]), 0) for part in shared), own], 1)
            for i, own in enumerate((k, v))
        )
        return _attend(q, k, v, softmax_scale)[0].contiguous()
    compute = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1]:
        out, lse = (t.to(compute).contiguous() for t in _attend(q, k, v, softmax_scale))
    else:
        out = torch.zeros(q.shape, dtype=compute)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=compute)
    for keys, values, lengths in shared:
        groups = keys.shape[0]
        queries, packed_out, packed_lse = (t.reshape(groups, -1, *t.shape[2:]) for t in (q, out, lse))
        for rows, valid in _valid(groups, keys.shape[1], lengths):
            found = _attend(queries[rows], keys[rows, :valid], values[rows, :valid], softmax_scale)
            _merge(packed_out[rows], packed_lse[rows], *found)
    return out.to(q.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Result (B, n, H, D) and log-sum-exp (B, n, H)."""
    out, lse = _ATTEND(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _valid(groups: int, length: int, lengths: torch.Tensor | None) -> list[tuple[slice, int]]:
    """Rows of shared keys and how many of their tokens are visible."""
    if lengths is None:
        return [(slice(None), length)]
    return [(slice(row, row + 1), valid) for row, valid in enumerate(lengths.tolist()) if valid]


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Adds to results (., n, H, D) of some keys, with their log-sum-exp (., n, H), those of other keys."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_()[..., None]).addcmul_(other.to(out.dtype), (other_lse - total).exp_()[..., None])
    lse.copy_(total)
