"""Log-probability, entropy and KL of tokens for CPUs: tiles of logits that stay in the cache.

A tile is some rows times some of the vocabulary. Forward, the softmax's sums go from tile to tile; backward, the
gradient of a tile's logits follows from the log-sum-exp of the forward pass and is used up at once. Bits have few
logits and take the reference's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs import reference
from fastvar.kernels.token_log_probs.reference import IMPOSSIBLE, check_range, chunks, padded

# Larger ones are little faster. What a tile takes is of about equal size, 768 KiB, so that malloc can use it again:
# from 1 MiB on it needs twice the memory.
COLUMNS = 1024  # of a tile, at most
TILE = 3 * 2**16  # logits of a tile, 192 rows
ROWS = 1024  # of a tile, at most
PIECE = 3 * 2**16  # elements of the weight's gradient that a product gives at a time, or 128 rows


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
    """See the reference."""
    others = (reference_hidden, reference_weight, reference_bias)
    if tokens.ndim == 3:
        return reference.forward(hidden, weight, bias, tokens, *others, temperature, mean)
    head = _Head(hidden, weight, bias, temperature)
    other = None if reference_hidden is None else _Head(*others, temperature)  # type: ignore[arg-type]
    check_range(tokens, head.size)
    results = reference.new_results(hidden, tokens, other is not None, mean)
    picked = tokens.flatten().long()
    for rows in chunks(len(picked), _rows(head)):
        reference.write(results, rows, _score(head, other, padded(picked[rows])[:, None], rows, mean))
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
) -> list[torch.Tensor]:
    """Gradients of hidden, weight and bias, as far as they are needed; the logits of each tile are computed anew."""
    others = (reference_hidden, reference_weight, reference_bias)
    if tokens.ndim == 3:
        return reference.backward(grads, hidden, weight, bias, tokens, *others, temperature, mean, results, needs)
    head = _Head(hidden, weight, bias, temperature)
    other = None
    if reference_hidden is not None and grads[2] is not None:
        other = _Head(reference_hidden, reference_weight, reference_bias, temperature)
    picked = tokens.flatten().long()
    of_hidden = torch.empty(head.rows.shape, dtype=hidden.dtype) if needs[0] else None
    of_weight = torch.zeros(weight.shape, dtype=head.dtype) if needs[1] and weight is not None else None
    of_bias = torch.zeros(head.size, dtype=head.dtype) if needs[2] and bias is not None else None
    for rows in chunks(len(picked), _rows(head)):
        slopes = _Slopes(grads, head, other, padded(picked[rows])[:, None], results, rows)
        states, count = head.states(rows), rows.stop - rows.start
        own = None
        for part in chunks(head.size, COLUMNS):
            slope = slopes.tile(states, part)  # [m, n]
            if of_hidden is not None and head.weight is None:
                of_hidden[rows, part] = slope[:count]
            elif of_hidden is not None:
                product = _product(slope, head.matrix(part).T)
                own = product if own is None else own.add_(product)
            if of_weight is not None:
                for piece in chunks(slope.shape[1], max(128, PIECE // max(1, states.shape[1]))):
                    of_weight[part][piece].add_(_product(slope[:, piece].T, states.T))
            if of_bias is not None:
                of_bias[part].add_(slope.sum(0))
        if of_hidden is not None and own is not None:
            of_hidden[rows] = own[:count]
    found: list[torch.Tensor] = []
    if of_hidden is not None:
        found.append(of_hidden.view(hidden.shape))
    if of_weight is not None and weight is not None:
        found.append(of_weight.to(weight.dtype))
    if of_bias is not None and bias is not None:
        found.append(of_bias.to(bias.dtype))
    return found


class _Head:
    """Tiles of logits."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, temperature: float
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.rows = hidden.flatten(0, 1)  # [M, E]
        self.weight, self.bias, self.temperature = weight, bias, temperature
        self.size = hidden.shape[-1] if weight is None else len(weight)

    def states(self, rows: slice) -> torch.Tensor:
        """A chunk's rows (m, E), padded."""
        return padded(self.rows[rows].to(self.dtype))

    def matrix(self, part: slice) -> torch.Tensor:
        """Rows of the weight (n, E)."""
        assert self.weight is not None
        return self.weight[part].to(self.dtype).contiguous()  # oneDNN takes a thousand times as long for slices

    def tile(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """Logits (m, n) divided by the temperature; to be written to."""
        if self.weight is None:
            logits = states[:, part].clone()
        else:
            bias = None if self.bias is None else self.bias[part].to(self.dtype)
            logits = _product(states, self.matrix(part), bias)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def finite_tile(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """The same with `IMPOSSIBLE` for minus infinity: 0 times its exponential is then 0."""
        return self.tile(states, part).clamp_min_(IMPOSSIBLE)


class _Softmax:
    """The largest logit of each row so far, the sum of exp(logit - largest), and sums weighted with that; all (m, 1).

    Attributes:
        peak: the largest logit.
        total: the sum.
        along: the sum times the logit less the largest.
    """

    def __init__(self, states: torch.Tensor) -> None:
        self.peak = states.new_full((len(states), 1), IMPOSSIBLE)
        self.total, self.along = states.new_zeros(len(states), 1), states.new_zeros(len(states), 1)

    def add(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a tile, which is used up. Returns its exp(logit - largest) and what earlier sums are worth now."""
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        step = self.peak - peak
        decay = step.exp()
        powers = logits.sub_(peak).exp()
        along = logits.mul_(powers).sum(-1, keepdim=True)
        self.along = decay * (self.along + step * self.total) + along
        self.total = decay * self.total + powers.sum(-1, keepdim=True)
        self.peak = peak
        return powers, decay


def _score(
    head: _Head, other: _Head | None, tokens: torch.Tensor, rows: slice, mean: bool
) -> tuple[torch.Tensor | None, ...]:
    """What `forward` returns of a chunk; its tokens (m, 1) are padded."""
    states = head.states(rows)
    own, average, gap = (states.new_zeros(len(states), 1) for _ in range(3))
    softmax = _Softmax(states)
    if other is not None:
        other_states = other.states(rows)
        other_softmax = _Softmax(other_states)
    for part in chunks(head.size, COLUMNS):
        logits = head.finite_tile(states, part)
        place = tokens - part.start
        inside = (place >= 0) & (place < logits.shape[1])
        own = torch.where(inside, logits.gather(-1, place.clamp(0, logits.shape[1] - 1)), own)
        if mean:
            average += logits.sum(-1, keepdim=True)
        if other is None:
            softmax.add(logits)
            continue
        other_logits = other.finite_tile(other_states, part)
        difference = logits - other_logits
        other_softmax.add(other_logits)
        powers, decay = softmax.add(logits)
        gap = decay * gap + difference.mul_(powers).sum(-1, keepdim=True)
    log = softmax.total.log()
    sums = [softmax.peak + log]
    if other is not None:
        sums.append(other_softmax.peak + other_softmax.total.log())
    return (
        (own - softmax.peak - log)[:, 0],
        (log - softmax.along / softmax.total)[:, 0],
        None if other is None else (gap / softmax.total - sums[0] + sums[1])[:, 0],
        (average / head.size - sums[0])[:, 0],
        torch.stack(sums)[..., 0],
    )


class _Slopes:
    """Gradients of a chunk's logits, 0 in padded rows.

    With the gradients g of the reference's formulas the slope is p_j (a l_j - g_KL q_j + c), a = g_KL - g_H, and two
    terms that stand alone: g_l at the token and g_A / V everywhere.
    """

    def __init__(
        self,
        grads: Sequence[torch.Tensor | None],
        head: _Head,
        other: _Head | None,
        tokens: torch.Tensor,
        results: Sequence[torch.Tensor],
        rows: slice,
    ) -> None:
        def column(values: torch.Tensor) -> torch.Tensor:
            return padded(values.reshape(-1, 1)[rows].to(head.dtype))

        self.head, self.other, self.tokens, self.count = head, other, tokens, rows.stop - rows.start
        self.other_states = None if other is None else other.states(rows)
        self.sums = [column(sums) for sums in results[4]]
        given = [None if g is None or not g.numel() else column(g) / head.temperature for g in grads[:4]]
        self.of_own, of_entropy, self.of_kl, self.of_mean = given
        zero = head.rows.new_zeros(len(tokens), 1, dtype=head.dtype)
        self.constant, self.along = zero.clone(), None
        for gradient in (self.of_own, self.of_mean):
            if gradient is not None:
                self.constant -= gradient
        if of_entropy is not None or self.of_kl is not None:
            self.along = zero
        if of_entropy is not None:
            self.along = self.along - of_entropy
            self.constant -= of_entropy * column(results[1])
        if self.of_kl is not None:
            self.along = self.along + self.of_kl
            self.constant -= self.of_kl * column(results[2])

    def tile(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """Of some columns (m, n)."""
        if self.along is None:
            slope = self.head.tile(states, part).sub_(self.sums[0]).exp_().mul_(self.constant)
        else:
            logs = self.head.finite_tile(states, part).sub_(self.sums[0])
            slope = logs.exp()
            factor = logs.mul_(self.along).add_(self.constant)
            if self.other is not None:
                others = self.other.finite_tile(self.other_states, part).sub_(self.sums[1])
                factor.sub_(others.mul_(self.of_kl))
            slope.mul_(factor)
        if self.of_mean is not None:
            slope += self.of_mean / self.head.size
        if self.of_own is not None:
            place = self.tokens - part.start
            inside = (place >= 0) & (place < slope.shape[1])
            slope.scatter_add_(-1, place.clamp(0, slope.shape[1] - 1), torch.where(inside, self.of_own, 0))
        slope[self.count :] = 0
        return slope


def _rows(head: _Head) -> int:
    """Of a tile; of the vocabulary alone, so that tiles begin at the same rows in any batch."""
    return min(TILE // min(max(head.size, 1), COLUMNS) // 16 * 16, ROWS)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. PyTorch itself asks MKL for float32 products, which on AMD processors takes twice as long.
    Neither lets a row's result depend on the other rows."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.enabled and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
