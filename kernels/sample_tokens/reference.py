"""Drawing tokens and bits in plain PyTorch: the specification."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from fastvar.random import uniform

_STREAM = 0  # of fastvar.random: the draws of tokens and bits
_CHUNK = 2**19  # logits
_LARGEST = 1e30  # stands for an infinite logit of a bit


def forward(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    seeds: torch.Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    position: int,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, n), and with `log_probs` the model's and the sampler's log-probabilities (B, n), else empty ones."""
    batch, count, size = logits.shape
    rows = logits.reshape(-1, size)
    others = None if unconditional is None or guidance == 0 else unconditional.reshape(-1, size)
    draws = _uniform(seeds[:, None], torch.arange(position, position + count, device=logits.device)).view(-1, 1)
    # A CPU takes as many rows at a time as stay in its caches.
    chunk = max(1, _CHUNK // size if logits.device.type == "cpu" else len(rows))
    found = [
        _draw(
            rows[i : i + chunk],
            None if others is None else others[i : i + chunk],
            draws[i : i + chunk],
            guidance,
            temperature,
            top_k,
            top_p,
            log_probs,
        )
        for i in range(0, max(1, len(rows)), chunk)
    ]
    tokens, own, sampled = (torch.cat(parts).view(batch, count) for parts in zip(*found, strict=True))
    return (tokens, own, sampled) if log_probs else (tokens, own.new_empty(0), own.new_empty(0))


def _draw(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    draws: torch.Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward` for rows (M, V) and their uniform numbers (M, 1); all results are (M, 1)."""
    guided = _guided(logits, unconditional, guidance, temperature)  # [M, V]
    threshold = _threshold(guided, top_k, top_p)
    if threshold is not None:
        # Keeps what is not below the threshold: several times faster than a boolean mask. Only differences below the
        # smallest normal number go unnoticed.
        guided = F.threshold(guided - threshold, -torch.finfo(guided.dtype).tiny, -math.inf)
    weights = guided.softmax(-1)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    if logits.device.type == "cpu" and not total.isfinite().all():  # elsewhere the check would wait for the device
        raise ValueError("sample_tokens: logits: expected a finite largest logit in every row, got NaN or infinities")
    # The sum grows only at tokens of positive weight, so that the first index above the target is one of them. The
    # target stays below the total, to which draw * total may round up.
    target = torch.minimum(draws.to(sums.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, target, right=True).clamp_(max=logits.shape[1] - 1)
    if not log_probs:
        return tokens, total, total
    own = _guided(logits, None, 0, temperature).log_softmax(-1).gather(-1, tokens)
    return tokens, own, (weights.gather(-1, tokens) / total).log()


def bits(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    seeds: torch.Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    position: int,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits (B, n, d), and with `log_probs` the log-probabilities (B, n) summed over the bits, else empty ones. Infinite
    logits make bits certain; guidance takes them for `_LARGEST`, whose differences are no NaN."""
    count, size = logits.shape[1:]
    guided = _guided(_finite(logits), _finite(unconditional), guidance, temperature)  # [B, n, d]
    # Of a pair the smaller one has probability sigmoid(-|z|) and goes where that is <= 1 - p: |z| >= log(p / (1 - p)).
    # A tie (z = 0) is never broken, by top-k neither.
    cutoff = 0.0 if top_k == 1 else math.inf
    if top_k != 1 and 0 < top_p < 1:
        cutoff = math.log(top_p / (1 - top_p))
    certain = (guided.abs() >= cutoff) & (guided != 0)

    first = position * size
    counters = torch.arange(first, first + count * size, device=logits.device).view(count, size)
    draw = _uniform(seeds[:, None, None], counters).to(guided.dtype)  # [B, n, d]
    # As for a vocabulary of two in index order: 1 where the draw is past the probability of 0. Not torch.sigmoid, whose
    # last digit depends on an element's place in the tensor.
    zero = 1 / (1 + guided.exp())
    drawn = torch.where(certain, guided > 0, draw >= zero)

    if not log_probs:
        return drawn, guided.new_empty(0), guided.new_empty(0)
    sign = drawn.to(guided.dtype) * 2 - 1
    own = F.logsigmoid(sign * _guided(logits, None, 0, temperature)).sum(-1)
    sampled = F.logsigmoid(sign * guided).masked_fill(certain, 0).sum(-1)
    return drawn, own, sampled


def _finite(logits: torch.Tensor | None) -> torch.Tensor | None:
    if logits is None:
        return None
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
        last = values[..., :1]
        missing = (logits == last).sum(-1, keepdim=True) - (values == last).sum(-1, keepdim=True)
        masses += missing * masses[..., :1]
    # The first mass above 1 - p is that of the smallest survivor, or of an equal one. The largest always survives.
    survivor = torch.searchsorted(masses, (1 - top_p) * masses[..., -1:], right=True).clamp_(max=k - 1)
    return values.gather(-1, survivor)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, in any order. NumPy's partition is many times as fast as torch's topk on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), -k, axis=-1)[..., -k:])
    return values.topk(k, sorted=False).values


def _rising(values: torch.Tensor) -> torch.Tensor:
    """Each row sorted. NumPy's sort of floats is vectorised, nearly ten times as fast as torch's on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def _uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    return uniform(seeds, torch.full_like(counters[..., :1], _STREAM), counters)
