"""Attention of new queries to a cache by PyTorch's flash attention for CPUs, to each of the three parts.

Rows that share a part attend to it one after the other, so that nothing shared is copied and no row's result depends on
how many there are; the parts are merged by log-sum-exp. Only of few keys a copy for every row costs less. In half
precision a part's result is rounded before it is merged: float32 copies of the cache would cost more than attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from fastvar.kernels.common.merging import merge

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import PrefixKV
    from fastvar.ops.cached_attention import CachedAttentionCall

FEW = 256  # keys of a row that are copied rather than merged
_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def forward(call: CachedAttentionCall) -> torch.Tensor:
    """See the reference."""
    q, softmax_scale = call.q, call.softmax_scale
    parts = [part for part in call.parts if part.k.shape[1]]
    if not q.numel() or not parts:
        return torch.zeros(q.shape, dtype=q.dtype)
    if len(parts) == 1 and parts[0].lengths is None and parts[0].k.shape[0] == q.shape[0]:
        return _attend(q, *parts[0][:2], softmax_scale)[0].contiguous()
    if sum(part.k.shape[1] for part in parts) <= FEW:
        return _copied(q, parts, softmax_scale)
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=compute)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=compute)
    for part in reversed(parts):  # a row's own keys first
        for rows, keys, count in _shares(part, q.shape[0]):
            merge(out[rows], lse[rows], *_attend(q[rows], part.k[keys, :count], part.v[keys, :count], softmax_scale))
    return out.to(q.dtype)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result (B, n, H, D) and log-sum-exp (B, n, H). The kernel takes its result's layout from q's, and writes it as if
    the elements of a head were adjacent; PyTorch 2.11 reads keys and values so too."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out, lse = _ATTEND(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _copied(q: torch.Tensor, parts: list[PrefixKV], scale: float) -> torch.Tensor:
    """By one call on a copy of all keys for each row."""
    batch, mask = q.shape[0], None
    k, v = (torch.cat([part[i].repeat_interleave(batch // len(part[i]), 0) for part in parts], 1) for i in range(2))
    if parts[0].lengths is not None:  # of the prefix, which comes first
        lengths = parts[0].lengths.repeat_interleave(batch // len(parts[0].lengths))[:, None]
        column = torch.arange(k.shape[1])
        hidden = (column >= lengths) & (column < parts[0].k.shape[1])
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
    return _attend(q, k, v, scale, mask)[0].contiguous()


def _shares(part: PrefixKV, batch: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows of q, the rows of keys that they see, row for row, and how many keys."""
    groups = part.k.shape[0]
    times = batch // groups
    if part.lengths is None:
        for member in range(times):
            yield slice(member, None, times), slice(None), part.k.shape[1]
        return
    for group, valid in enumerate(part.lengths.tolist()):
        for row in range(group * times, (group + 1) * times) if valid > 0 else ():
            yield slice(row, row + 1), slice(group, group + 1), valid
