"""Drawing tokens in PyTorch for CPUs: as many rows at a time as stay in the caches, sorted by NumPy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from fastvar.random import uniform

if TYPE_CHECKING:
    from fastvar.ops.sample_tokens import SampleCall

_STREAM = 0  # of fastvar.random: the draws of tokens and bits
_CHUNK = 2**19  # logits


def tokens(call: SampleCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    batch, count, size = call.logits.shape
    rows = call.logits.reshape(-1, size)
    others = None
    if call.unconditional is not None and call.guidance != 0:
        others = call.unconditional.reshape(-1, size)
    counters = torch.arange(call.position, call.position + count)
    draws = uniform(call.seeds[:, None], torch.full_like(counters[:1], _STREAM), counters).view(-1, 1)
    drawn_parts = []
    for part in torch.arange(max(1, len(rows))).split(max(1, _CHUNK // size)):
        some = slice(int(part[0]), int(part[-1]) + 1)
        drawn_parts.append(_draw(call, rows[some], None if others is None else others[some], draws[some]))
    drawn, own, sampled = (torch.cat(parts).view(batch, count) for parts in zip(*drawn_parts, strict=True))
    return (drawn, own, sampled) if call.log_probs else (drawn, own.new_empty(0), own.new_empty(0))


def _draw(
    call: SampleCall, logits: torch.Tensor, unconditional: torch.Tensor | None, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tokens` for rows (M, V) and their uniform numbers (M, 1); all results are (M, 1)."""
    guided = _guided(logits, unconditional, call.guidance, call.temperature)  # [M, V]
    threshold = _threshold(guided, call.top_k, call.top_p)
    if threshold is not None:
        # Keeps what is not below the threshold: several times faster than a boolean mask. Only differences below the
        # smallest normal number go unnoticed.
        guided = F.threshold(guided - threshold, -torch.finfo(guided.dtype).tiny, -math.inf)
    weights = guided.softmax(-1)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    if not total.isfinite().all():
        raise ValueError("sample_tokens: logits: expected a finite largest logit in every row, got NaN or infinities")
    # The sum grows only at tokens of positive weight, so that the first index above the target is one of them. The
    # target stays below the total, to which draw * total may round up.
    target = torch.minimum(draws.to(sums.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(sums, target, right=True).clamp_(max=logits.shape[1] - 1)
    if not call.log_probs:
        return drawn, total, total
    own = _guided(logits, None, 0, call.temperature).log_softmax(-1).gather(-1, drawn)
    return drawn, own, (weights.gather(-1, drawn) / total).log()


def _guided(
    logits: torch.Tensor, unconditional: torch.Tensor | None, guidance: float, temperature: float
) -> torch.Tensor:
    """((1 + t) conditional - t unconditional) / temperature, each operation rounded, in float32 or float64; what the
    condition makes impossible stays so."""
    out = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if unconditional is not None and guidance != 0:
        impossible = out == -math.inf
        out = out * (1 + guidance) - unconditional.to(out.dtype) * guidance
        out.masked_fill_(impossible, -math.inf)
    return out / temperature if temperature != 1 else out


def _threshold(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor | None:
    """The smallest logit that top-k and then top-p keep, (M, 1), or None if all are kept."""
    size = logits.shape[-1]
    k = top_k if 0 < top_k < size else size
    if k == 1:
        return logits.amax(-1, keepdim=True)
    if not 0 < top_p < 1:
        if k == size:
            return None
        # Finite even if the k-th value is not: what lies so far below the largest has probability 0 anyway.
        smallest = _largest(logits, k).amin(-1, keepdim=True)
        return torch.maximum(smallest, logits.amax(-1, keepdim=True) - 1e4)
    values = _rising(logits if k == size else _largest(logits, k))  # [M, k]
    masses = (values - values[..., -1:]).exp().cumsum(-1)  # of all kept logits up to each
    if k < size:
        # Top-k keeps every logit equal to the k-th value: add the copies that are not among them.
        smallest = values[..., :1]
        missing = (logits == smallest).sum(-1, keepdim=True) - (values == smallest).sum(-1, keepdim=True)
        masses += missing * masses[..., :1]
    # The first mass above 1 - p is that of the smallest survivor, or of an equal one. The largest always survives.
    survivor = torch.searchsorted(masses, (1 - top_p) * masses[..., -1:], right=True).clamp_(max=k - 1)
    return values.gather(-1, survivor)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, in any order. NumPy's partition is many times as fast as torch's topk on a CPU."""
    return torch.from_numpy(np.partition(values.numpy(), -k, axis=-1)[..., -k:])


def _rising(values: torch.Tensor) -> torch.Tensor:
    """Each row sorted. NumPy's sort of floats is vectorised, nearly ten times as fast as torch's on a CPU."""
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
