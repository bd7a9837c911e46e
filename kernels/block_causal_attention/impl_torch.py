"""Block-causal attention by PyTorch's flash attention for CPUs, in rectangles, with a backward pass of its own.

The samples of a group attend to their shared prefix in one call, as the rows of one matrix, so that it is never copied;
parts are merged by log-sum-exp. Grids of few tokens are one rectangle with a dense mask: there a call costs more than
what it could skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastvar.kernels.common.merging import merge

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
DENSE = 128  # tokens up to which all scales are one rectangle
_ALL = slice(None)


class _Part(NamedTuple):
    """A rectangle of attention. Indices into (B, H, L, D), or (B/G, H, G L, D) for the prefix's."""

    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: torch.Tensor | None = None  # (1, 1, L, L), 0 or minus infinity

    @property
    def whole(self) -> bool:
        return all(index == _ALL for index in self.rows + self.keys)


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    q, prefix = call.q, call.prefix
    batch, length, heads, _ = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    if not q.numel():
        return torch.empty_like(q), torch.empty(batch, heads, length, dtype=compute)
    queries, keys, values = (_heads_first(tensor, compute) for tensor in (q, call.k, call.v))
    parts = _own_parts(call.schedule, call.block_diagonal, compute)
    by_rectangle = [
        tuple(t.transpose(1, 2) for t in _attend(queries, keys, values, part, call.softmax_scale)) for part in parts
    ]
    out, lse = (t[0].contiguous() if len(t) == 1 else torch.cat(t, 1) for t in zip(*by_rectangle, strict=True))
    if prefix is not None:
        groups = prefix.k.shape[0]
        packed = _heads_first(_packed(q, groups), compute)
        keys, values = _heads_first(prefix.k, compute), _heads_first(prefix.v, compute)
        packed_out, packed_lse = _packed(out, groups), _packed(lse, groups)  # views
        for part in _prefix_parts(groups, prefix.k.shape[1], prefix.lengths):
            other, sums = _attend(packed, keys, values, part, call.softmax_scale)
            merge(packed_out[part.rows[0]], packed_lse[part.rows[0]], other.transpose(1, 2), sums.transpose(1, 2))
    return out.to(q.dtype), lse.transpose(1, 2).contiguous()


def backward(
    call: AttentionCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of q, k, v and of the prefix's keys and values; saved: the results."""
    (out, lse), (grad, grad_lse) = saved, grads
    q, k, v, prefix = call.q, call.k, call.v, call.prefix
    given = {"q": q, "k": k, "v": v}
    if prefix is not None:
        given |= {"prefix_k": prefix.k, "prefix_v": prefix.v}
    if not out.numel():
        return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in given.items()}
    compute = lse.dtype
    g = torch.zeros(q.shape, dtype=compute) if grad is None else grad.to(compute).contiguous()
    slopes = None if grad_lse is None else grad_lse.transpose(1, 2)  # [B, L, H]
    streams = [g, q, out, lse.transpose(1, 2), slopes]
    totals = _gradients(k, v, streams, _own_parts(call.schedule, call.block_diagonal, compute), call.softmax_scale)
    if prefix is not None:
        groups = prefix.k.shape[0]
        streams = [None if t is None else _packed(t, groups) for t in streams]
        parts = _prefix_parts(groups, prefix.k.shape[1], prefix.lengths)
        dq, *shared = _gradients(prefix.k, prefix.v, streams, parts, call.softmax_scale)
        totals = [totals[0] + dq.view(q.shape), *totals[1:], *shared]
    return {name: total.to(t.dtype) for total, (name, t) in zip(totals, given.items(), strict=True)}


def _gradients(
    k: torch.Tensor,
    v: torch.Tensor,
    streams: Sequence[torch.Tensor | None],
    parts: Sequence[_Part],
    softmax_scale: float,
) -> list[torch.Tensor]:
    """What attention in some rectangles adds to the gradients of queries, keys and values (., ., H, D), contiguous.

    streams: the result's gradient, queries, result, log-sum-exp (., ., H) and its gradient, or None."""
    queries = streams[1]
    assert streams[0] is not None and queries is not None
    compute = streams[0].dtype
    grad, some_q, out, lse, slopes = (None if t is None else _heads_first(t, compute) for t in streams)
    assert grad is not None and some_q is not None and out is not None and lse is not None
    keys, values = _heads_first(k, compute), _heads_first(v, compute)
    totals = (
        None if len(parts) == 1 and parts[0].whole else [torch.zeros(t.shape, dtype=compute) for t in (queries, k, v)]
    )
    for part in parts:
        rows, columns = part.rows, part.keys
        gradients = _BACKWARD(
            grad[rows], some_q[rows], keys[columns], values[columns], out[rows], lse[rows],
            0.0, False, attn_mask=part.mask, scale=softmax_scale,
        )  # fmt: skip
        if slopes is not None:  # d lse / d scores are the weights
            scores = some_q[rows] @ keys[columns].mT * softmax_scale
            scores = scores if part.mask is None else scores + part.mask
            weights = (scores - lse[rows][..., None]).exp() * slopes[rows][..., None] * softmax_scale
            gradients = (gradients[0] + weights @ keys[columns], gradients[1] + weights.mT @ some_q[rows], gradients[2])
        if totals is None:
            return [t.transpose(1, 2).contiguous() for t in gradients]
        for total, place, gradient in zip(totals, (rows, columns, columns), gradients, strict=True):
            total.transpose(1, 2)[place].add_(gradient)
    return totals


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: _Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _FORWARD(q[part.rows], k[part.keys], v[part.keys], attn_mask=part.mask, scale=scale)


def _heads_first(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(., ., H, ...) -> (., H, ., ...). The kernel takes its result's layout from q's, and writes it as if the elements
    of a head were adjacent: here they are."""
    tensor = tensor.to(dtype)
    return (tensor if tensor.ndim < 4 or tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def _packed(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, L, ...) -> (B/G, G L, ...): the samples of a group one after the other; a view where the layout allows it."""
    return tensor.reshape(groups, -1, *tensor.shape[2:])


def _own_parts(schedule: ScaleSchedule, block_diagonal: bool, dtype: torch.dtype) -> list[_Part]:
    if schedule.num_tokens <= DENSE:
        return [_Part((_ALL,), (_ALL,), _dense_mask(schedule, block_diagonal, dtype))]
    ranges = zip(schedule.starts, schedule.ends, strict=True)
    return [
        _Part((_ALL, _ALL, slice(start, end)), (_ALL, _ALL, slice(start if block_diagonal else 0, end)))
        for start, end in ranges
    ]


def _prefix_parts(groups: int, length: int, lengths: torch.Tensor | None) -> list[_Part]:
    if lengths is None:
        return [_Part((_ALL,), (_ALL,))] if length else []
    rows = [(slice(group, group + 1), valid) for group, valid in enumerate(lengths.tolist()) if valid > 0]
    return [_Part((row,), (row, _ALL, slice(0, valid))) for row, valid in rows]


@lru_cache(maxsize=16)
def _dense_mask(schedule: ScaleSchedule, block_diagonal: bool, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, L, L): 0 where a token (row) sees another, else minus infinity."""
    scale = torch.tensor(schedule.scale_of_token, device="cpu")
    seen = scale[:, None] == scale if block_diagonal else scale[:, None] >= scale
    return torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill_(~seen, -torch.inf)[None, None]
