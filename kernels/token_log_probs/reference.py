"""Log-probability, entropy and KL of tokens from hidden states in plain PyTorch, a chunk of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs import losses

_ROWS = 256  # of a chunk: 4 MiB of float32 logits at V = 4096
_STEP = 16  # chunks are padded to a multiple: matrix products of very few rows may sum in another order
IMPOSSIBLE = -1e30  # stands for minus infinity in sums: 0 * log 0 is 0. The token's own log-probability is infinite


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    reference_bias: torch.Tensor | None,
    temperature: float,
    mean: bool,
) -> tuple[torch.Tensor, ...]:
    """(B, L) log-probabilities, entropies, KL(policy || reference), mean log-probability of the vocabulary; (2 n, B, L)
    the largest logit and log of the sum of exp(logit - largest), of the reference's too. Empty are the KL without a
    reference, the mean if not asked for and the last of bits. The two stay apart as their sum, the log-sum-exp, loses
    the digits of the second to the first: a common offset of all logits would then change their probabilities."""
    head = _Head(hidden, weight, bias, temperature)
    reference = None
    if reference_hidden is not None:
        reference = _Head(reference_hidden, reference_weight, reference_bias, temperature)
    check_range(tokens, head.size)
    picked = tokens.flatten(0, 1)  # [M] tokens or [M, d] bits
    score = _score_tokens if tokens.ndim == 2 else _score_bits
    results = new_results(hidden, tokens, reference is not None, mean)
    for rows in chunks(len(picked), _ROWS):
        logits = head.logits(rows)[1]
        others = None if reference is None else reference.logits(rows)[1]
        write(results, rows, score(logits, padded(picked[rows]), others))
    return results


def backward(
    grads: Sequence[torch.Tensor | None],
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    reference_bias: torch.Tensor | None,
    temperature: float,
    mean: bool,
    results: Sequence[torch.Tensor],
    needs: Sequence[bool],
    unrounded: bool = False,
) -> list[torch.Tensor]:
    """Gradients of hidden, weight and bias, those that `needs` asks for; the logits of each chunk are computed anew.
    Rows whose incoming gradients are all 0 are left out: hidden states there may be anything, NaN included. With
    `unrounded` those of weight and bias stay in the dtype they were summed in, float16's of hidden in float32."""
    head = _Head(hidden, weight, bias, temperature)
    reference = None
    if reference_hidden is not None and grads[2] is not None:
        reference = _Head(reference_hidden, reference_weight, reference_bias, temperature)
    picked = tokens.flatten(0, 1)
    slopes = _slopes_tokens if tokens.ndim == 2 else _slopes_bits
    # under torch.compile results that nobody used, even empty ones, have gradients of zeros
    incoming = [None if g is None or not g.numel() else g.reshape(-1, 1).to(head.dtype) for g in grads[:4]]
    live = live_rows(grads, tokens)
    of_hidden = None
    if needs[0]:
        dtype = losses.unrounded(hidden.dtype) if unrounded else hidden.dtype
        of_hidden = head.rows.new_empty(head.rows.shape, dtype=dtype)
    of_weight = (
        head.rows.new_zeros(head.weight.shape, dtype=head.dtype) if needs[1] and head.weight is not None else None
    )
    of_bias = head.rows.new_zeros(head.bias.shape, dtype=head.dtype) if needs[2] and head.bias is not None else None
    for rows in chunks(len(picked), _ROWS):
        states, logits = head.logits(rows, live)
        others = None if reference is None else reference.logits(rows, live)[1]
        parts = [None if g is None else padded(g[rows]) for g in incoming]
        slope = slopes(logits, padded(picked[rows]), others, *parts)  # [m, V]; 0 in padded rows, as their gradients
        if temperature != 1:
            slope = slope / temperature
        if of_hidden is not None:
            own = slope if head.weight is None else slope @ head.weight
            of_hidden[rows] = own[: rows.stop - rows.start].to(of_hidden.dtype)
        if of_weight is not None:
            of_weight.addmm_(slope.T, states)
        if of_bias is not None:
            of_bias += slope.sum(0)
    found = []
    if of_hidden is not None:
        found.append(of_hidden.view(hidden.shape))
    if of_weight is not None and weight is not None:
        found.append(of_weight if unrounded else of_weight.to(weight.dtype))
    if of_bias is not None and bias is not None:
        found.append(of_bias if unrounded else of_bias.to(bias.dtype))
    return found


def policy_loss(*args: Any) -> tuple[torch.Tensor, ...]:
    """See `losses.policy_loss`."""
    return losses.policy_loss(forward, backward, *args)


def cross_entropy(*args: Any) -> tuple[torch.Tensor, ...]:
    """See `losses.cross_entropy`."""
    return losses.cross_entropy(forward, backward, *args)


class _Head:
    """Logits from hidden states, or the logits themselves where there is no weight."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, temperature: float
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.rows = hidden.flatten(0, 1)  # [M, E]
        self.weight = None if weight is None else weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.size = hidden.shape[-1] if weight is None else len(weight)
        self.temperature = temperature

    def logits(self, rows: slice, live: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a chunk: its padded rows (m, E) and the logits (m, V) divided by the temperature, both in `dtype`. With
        `live` (M, 1) the other rows are read as zeros."""
        states = self.rows[rows].to(self.dtype)
        states = padded(states if live is None else torch.where(live[rows], states, 0))
        out = states if self.weight is None else F.linear(states, self.weight, self.bias)
        return states, out / self.temperature if self.temperature != 1 else out


def new_results(hidden: torch.Tensor, tokens: torch.Tensor, reference: bool, mean: bool) -> tuple[torch.Tensor, ...]:
    """What `forward` returns, yet to be filled."""
    shape = tokens.shape[:2]
    sums = 0 if tokens.ndim == 3 else 2 + 2 * reference
    shapes = (shape, shape, shape if reference else (0,), shape if mean else (0,), (sums, *shape))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(torch.empty(each, dtype=dtype, device=hidden.device) for each in shapes)


def write(results: Sequence[torch.Tensor], rows: slice, found: Sequence[torch.Tensor | None]) -> None:
    """Put what was found for a padded chunk into its rows of the results."""
    for result, values in zip(results, found, strict=True):
        if values is not None and result.numel():
            result.flatten(-2)[..., rows] = values[..., : rows.stop - rows.start]


def chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def padded(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % _STEP
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def live_rows(grads: Sequence[torch.Tensor | None], tokens: torch.Tensor) -> torch.Tensor:
    """(M, 1) rows that have an incoming gradient other than 0."""
    live = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for gradient in grads[:4]:
        if gradient is not None and gradient.numel():
            live |= gradient != 0
    return live.view(-1, 1)


def check_range(tokens: torch.Tensor, size: int) -> None:
    # On another device the check would wait for it; there a token out of range is the caller's to avoid.
    if tokens.device.type != "cpu" or tokens.dtype == torch.bool or tokens.numel() == 0:
        return
    low, high = (int(value) for value in tokens.aminmax())
    last = 1 if tokens.ndim == 3 else size - 1
    if low < 0 or high > last:
        raise ValueError(f"token_log_probs: tokens: expected values from 0 to {last}, got {low} to {high}")


# Of tokens: z_j logits, l_j log-probabilities, p_j = exp(l_j), y the token, H entropy, q_j the reference's l_j, A the
# mean of the l_j over a vocabulary of V.
#   l_y: dl_y/dz_j = [j = y] - p_j      H: dH/dz_j = -p_j (l_j + H)
#   KL: dKL/dz_j = p_j (l_j - q_j - KL)      A: dA/dz_j = 1 / V - p_j


def _log_probs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, with `IMPOSSIBLE` for minus infinity so that 0 * log 0 is 0, and probabilities."""
    log_probs = logits.log_softmax(-1).clamp_min_(IMPOSSIBLE)
    return log_probs, log_probs.exp()


def _score_tokens(
    logits: torch.Tensor, tokens: torch.Tensor, others: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    log_probs, probs = _log_probs(logits)
    own = log_probs.gather(-1, tokens.long()[:, None])[:, 0]
    own = own.masked_fill(own <= IMPOSSIBLE, -math.inf)
    entropy, kl = -(probs * log_probs).sum(-1), None
    if others is not None:
        kl = (probs * (log_probs - _log_probs(others)[0])).sum(-1)
    sums = []
    for z in (logits,) if others is None else (logits, others):
        peak = z.amax(-1, keepdim=True)
        sums += [peak[:, 0], (z - peak).logsumexp(-1)]
    return own, entropy, kl, log_probs.mean(-1), torch.stack(sums)


def _slopes_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    others: torch.Tensor | None,
    of_own: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
    of_kl: torch.Tensor | None,
    of_mean: torch.Tensor | None,
) -> torch.Tensor:
    log_probs, probs = _log_probs(logits)
    factor = torch.zeros_like(probs) if of_own is None else (-of_own).expand_as(probs)
    if of_entropy is not None:
        entropy = -(probs * log_probs).sum(-1, keepdim=True)
        factor = factor - of_entropy * (log_probs + entropy)
    if of_kl is not None and others is not None:
        gap = log_probs - _log_probs(others)[0]
        factor = factor + of_kl * (gap - (probs * gap).sum(-1, keepdim=True))
    if of_mean is not None:
        factor = factor - of_mean
    slope = probs * factor
    if of_mean is not None:
        slope = slope + of_mean / slope.shape[-1]
    return slope if of_own is None else slope.scatter_add_(-1, tokens.long()[:, None], of_own)


# Of bits: z the difference logit, s = sigmoid(z), y the difference logit of the reference. Not torch.sigmoid, whose
# last digit depends on an element's place in the tensor. Infinite z make bits certain; here they are finite, so that 0
# times them is 0, save that the log-probability of the other value is minus infinity.
#   l: dl/dz = bit - s      H: dH/dz = -z s (1 - s)      KL: dKL/dz = (z - y) s (1 - s)      A: dA/dz = (1 - s - s) / 2


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.clamp(IMPOSSIBLE, -IMPOSSIBLE)


def _score_bits(
    logits: torch.Tensor, bits: torch.Tensor, others: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    sign = (bits != 0).to(logits.dtype) * 2 - 1
    own = F.logsigmoid(sign * logits).sum(-1)
    logits = _finite(logits)
    one, zero = F.logsigmoid(logits), F.logsigmoid(-logits)
    entropy, kl = -(one.exp() * one + zero.exp() * zero).sum(-1), None
    if others is not None:
        others = _finite(others)
        gap = one.exp() * (one - F.logsigmoid(others)) + zero.exp() * (zero - F.logsigmoid(-others))
        kl = gap.sum(-1)
    return own, entropy, kl, (one + zero).sum(-1) / 2, None


def _slopes_bits(
    logits: torch.Tensor,
    bits: torch.Tensor,
    others: torch.Tensor | None,
    of_own: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
    of_kl: torch.Tensor | None,
    of_mean: torch.Tensor | None,
) -> torch.Tensor:
    logits = _finite(logits)
    one, zero = 1 / (1 + (-logits).exp()), 1 / (1 + logits.exp())
    slope = torch.zeros_like(logits) if of_own is None else of_own * torch.where(bits != 0, zero, -one)
    if of_entropy is not None:
        slope = slope - of_entropy * (logits * (one * zero))
    if of_kl is not None and others is not None:
        slope = slope + of_kl * ((logits - _finite(others)) * (one * zero))
    if of_mean is not None:
        slope = slope + of_mean * ((zero - one) / 2)
    return slope
