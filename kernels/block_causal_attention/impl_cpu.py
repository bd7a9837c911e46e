"""Block-causal attention for CPUs: PyTorch's flash attention a scale at a time, with a backward pass of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastvar.schedule import ScaleSchedule

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Keys(NamedTuple):
    """Prefix and image together, (B, H, P + L, D) in the compute dtype, and what is visible of a ragged prefix."""

    k: torch.Tensor
    v: torch.Tensor
    prefix: int
    hidden: torch.Tensor | None  # (B, 1, 1, P + L), 0 or minus infinity


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
    """See the reference; lse (B, H, L) is always there."""
    batch, length, heads, _ = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(batch, heads, length, dtype=compute)
    if not out.numel():
        return out, lse
    keys = _keys(k, v, prefix_k, prefix_v, prefix_lengths, compute)
    queries = q.to(compute).transpose(1, 2)  # [B, H, L, D]
    for start, end, columns in _scales(schedule, keys.prefix, block_diagonal):
        found, sums = _FORWARD(
            queries[:, :, start:end],
            _rows(keys.k, columns),
            _rows(keys.v, columns),
            attn_mask=_mask(keys, columns),
            scale=softmax_scale,
        )
        out[:, start:end] = found.transpose(1, 2)
        lse[:, :, start:end] = sums
    return out, lse


def backward(
    grads: Sequence[torch.Tensor | None],
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
    results: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of q, k, v and of the prefix's keys and values, as far as they are needed."""
    out, lse = results
    grad, grad_lse = grads
    if not out.numel() or (grad is None and grad_lse is None):
        given = zip((q, k, v, prefix_k, prefix_v), needs, strict=False)
        return [torch.zeros(t.shape, dtype=t.dtype) for t, need in given if need and t is not None]
    compute = lse.dtype
    keys = _keys(k, v, prefix_k, prefix_v, prefix_lengths, compute)
    queries = q.to(compute).transpose(1, 2)
    dq = torch.zeros(queries.shape, dtype=compute)
    dk, dv = torch.zeros(keys.k.shape, dtype=compute), torch.zeros(keys.v.shape, dtype=compute)
    g = torch.zeros(queries.shape, dtype=compute) if grad is None else grad.to(compute).transpose(1, 2)
    o = out.to(compute).transpose(1, 2)
    for start, end, columns in _scales(schedule, keys.prefix, block_diagonal):
        rows, some_k, some_v = slice(start, end), _rows(keys.k, columns), _rows(keys.v, columns)
        mask = _mask(keys, columns)
        found = _BACKWARD(
            g[:, :, rows].contiguous(), queries[:, :, rows], some_k, some_v, o[:, :, rows], lse[:, :, rows],
            0.0, False, attn_mask=mask, scale=softmax_scale,
        )  # fmt: skip
        if grad_lse is not None:  # d lse / d scores are the weights
            scores = queries[:, :, rows] @ some_k.mT * softmax_scale
            scores = scores if mask is None else scores + mask
            weights = (scores - lse[:, :, rows, None]).exp() * grad_lse[:, :, rows, None] * softmax_scale
            found = (found[0] + weights @ some_k, found[1] + weights.mT @ queries[:, :, rows], found[2])
        dq[:, :, rows] = found[0]
        for total, part in ((dk, found[1]), (dv, found[2])):
            place = 0
            for column in columns:
                size = column.stop - column.start
                total[:, :, column] += part[:, :, place : place + size]
                place += size
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    own = [dq, dk[:, keys.prefix :], dv[:, keys.prefix :]]
    gradients = [t.to(x.dtype).contiguous() for t, x, need in zip(own, (q, k, v), needs, strict=False) if need]
    for total, x, need in ((dk, prefix_k, needs[3]), (dv, prefix_v, needs[4])):
        if need and x is not None:  # of all samples of a group
            groups = (x.shape[0], q.shape[0] // x.shape[0])
            gradients.append(total[:, : keys.prefix].unflatten(0, groups).sum(1).to(x.dtype))
    return gradients


def _keys(
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    compute: torch.dtype,
) -> _Keys:
    k, v = k.to(compute), v.to(compute)
    if prefix_k is None or prefix_v is None:
        return _Keys(k.transpose(1, 2), v.transpose(1, 2), 0, None)
    prefix, group = prefix_k.shape[1], k.shape[0] // max(prefix_k.shape[0], 1)
    k, v = (
        torch.cat([shared.to(compute).repeat_interleave(group, 0), own], 1)
        for shared, own in ((prefix_k, k), (prefix_v, v))
    )
    hidden = None
    if prefix_lengths is not None:
        column = torch.arange(k.shape[1])
        unseen = (column >= prefix_lengths.repeat_interleave(group)[:, None]) & (column < prefix)
        hidden = torch.zeros(unseen.shape, dtype=compute).masked_fill_(unseen, -torch.inf)[:, None, None]
    return _Keys(k.transpose(1, 2), v.transpose(1, 2), prefix, hidden)


def _scales(schedule: ScaleSchedule, prefix: int, block_diagonal: bool) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """First and last row of each scale and which keys its rows see."""
    for start, end in zip(schedule.starts, schedule.ends, strict=True):
        if block_diagonal and prefix and start:
            yield start, end, (slice(0, prefix), slice(prefix + start, prefix + end))
        else:
            yield start, end, (slice(prefix + start if block_diagonal and not prefix else 0, prefix + end),)


def _rows(tensor: torch.Tensor, columns: tuple[slice, ...]) -> torch.Tensor:
    parts = [tensor[:, :, column] for column in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _mask(keys: _Keys, columns: tuple[slice, ...]) -> torch.Tensor | None:
    if keys.hidden is None:
        return None
    parts = [keys.hidden[..., column] for column in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)
