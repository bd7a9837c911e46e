"""Drawing tokens and bits in plain PyTorch: the specification."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastvar.random import uniform

if TYPE_CHECKING:
    from fastvar.ops.sample_tokens import SampleCall

_STREAM = 0  # of fastvar.random: the draws of tokens and bits
_LARGEST = 1e30  # stands for an infinite logit of a bit

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(call: SampleCall) -> Drawn:
    """Tokens (B, n), and with `log_probs` the model's and the sampler's log-probabilities (B, n), else empty ones."""
    guided = _guided(call.logits, call.unconditional, call.guidance, call.temperature)  # [B, n, V]
    guided = guided.masked_fill(guided < _threshold(guided, call.top_k, call.top_p), -math.inf)
    sums = guided.softmax(-1).cumsum(-1)
    total = sums[..., -1:]
    if total.device.type == "cpu" and not total.isfinite().all():  # elsewhere the check would wait for the device
        raise ValueError("sample_tokens: logits: expected a finite largest logit in every row, got NaN or infinities")
    # The sum grows only at tokens of positive weight, so that the first index above the target is one of them. The
    # target stays below the total, to which draw * total may round up.
    draws = _uniform(call, 1).to(sums.dtype)
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[-1] - 1)
    if not call.log_probs:
        return drawn[..., 0], total.new_empty(0), total.new_empty(0)
    own = _guided(call.logits, None, 0, call.temperature).log_softmax(-1)
    own, sampled = (scores.gather(-1, drawn)[..., 0] for scores in (own, guided.log_softmax(-1)))
    return drawn[..., 0], own, sampled


def bits(call: SampleCall) -> Drawn:
    """Bits (B, n, d), and with `log_probs` the log-probabilities (B, n) summed over the bits, else empty ones. Infinite
    logits make bits certain; guidance takes them for `_LARGEST`, whose differences are no NaN."""
    conditional, unconditional = (None if t is None else _finite(t) for t in (call.logits, call.unconditional))
    guided = _guided(conditional, unconditional, call.guidance, call.temperature)  # [B, n, d]
    # Of a pair the smaller one has probability sigmoid(-|z|) and goes where that is <= 1 - p: |z| >= log(p / (1 - p)).
    # A tie (z = 0) is never broken, by top-k neither.
    cutoff = 0.0 if call.top_k == 1 else math.inf
    if call.top_k != 1 and 0 < call.top_p < 1:
        cutoff = math.log(call.top_p / (1 - call.top_p))
    certain = (guided.abs() >= cutoff) & (guided != 0)
    # As for a vocabulary of two in index order: 1 where the draw is past the probability of 0. Not torch.sigmoid, whose
    # last digit depends on an element's place in the tensor.
    zero = 1 / (1 + guided.exp())
    drawn = torch.where(certain, guided > 0, _uniform(call, guided.shape[-1]).to(guided.dtype) >= zero)
    if not call.log_probs:
        return drawn, guided.new_empty(0), guided.new_empty(0)
    sign = drawn.to(guided.dtype) * 2 - 1
    own = F.logsigmoid(sign * _guided(call.logits, None, 0, call.temperature)).sum(-1)
    return drawn, own, F.logsigmoid(sign * guided).masked_fill(certain, 0).sum(-1)


def _uniform(call: SampleCall, each: int) -> torch.Tensor:
    """(B, n, each) by seed and place."""
    count, device = call.logits.shape[1], call.logits.device
    counters = torch.arange(call.position * each, (call.position + count) * each, device=device).view(count, each)
    return uniform(call.seeds[:, None, None], torch.full_like(counters[:, :1], _STREAM), counters)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-_LARGEST, _LARGEST)


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


def _threshold(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest logit that top-k and then top-p keep, (..., 1)."""
    size = logits.shape[-1]
    smallest = logits.topk(top_k if 0 < top_k < size else size).values[..., -1:]
    if 0 < top_p < 1:
        values = logits.masked_fill(logits < smallest, -math.inf).sort(-1).values
        masses = (values - values[..., -1:]).exp().cumsum(-1)  # of all kept logits up to each
        # The first mass above 1 - p is that of the smallest survivor, or of an equal one. The largest always survives.
        survivor = torch.searchsorted(masses, (1 - top_p) * masses[..., -1:], right=True).clamp_(max=size - 1)
        smallest = values.gather(-1, survivor)
    return smallest
