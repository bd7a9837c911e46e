"""Log-probability, entropy and KL of tokens for CPUs: tiles of logits that stay in the cache.

A tile is some rows times some of the vocabulary. Forward, the softmax's sums go from tile to tile; backward, the
gradient of a tile's logits follows from the sums of the forward pass and is used up at once. Bits have few logits and
take the reference's formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs import losses, reference
from fastvar.kernels.token_log_probs.reference import IMPOSSIBLE, check_range, chunks, live_rows, padded

# Tiles of many rows read the weight, turn it round and add to its gradient less often. Larger tiles are little faster
# and take more memory: from 1 MiB on malloc needs twice as much of it.
COLUMNS = 512  # of a tile, at most
TILE = 3 * 2**16  # logits of a tile, 384 rows
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
    unrounded: bool = False,
) -> list[torch.Tensor]:
    """Gradients of hidden, weight and bias, as far as they are needed; the logits of each tile are computed anew. Rows
    whose incoming gradients are all 0 are left out. `unrounded` as in the reference."""
    others = (reference_hidden, reference_weight, reference_bias)
    if tokens.ndim == 3:
        return reference.backward(
            grads, hidden, weight, bias, tokens, *others, temperature, mean, results, needs, unrounded
        )
    head = _Head(hidden, weight, bias, temperature)
    other = None
    if reference_hidden is not None and grads[2] is not None:
        other = _Head(reference_hidden, reference_weight, reference_bias, temperature)
    picked = tokens.flatten().long()
    of_hidden = None
    if needs[0]:
        dtype = losses.unrounded(hidden.dtype) if unrounded else hidden.dtype
        of_hidden = torch.empty(head.rows.shape, dtype=dtype)
    of_weight = torch.zeros(weight.shape, dtype=head.dtype) if needs[1] and weight is not None else None
    of_bias = torch.zeros(head.size, dtype=head.dtype) if needs[2] and bias is not None else None
    live = live_rows(grads, tokens)
    for rows in chunks(len(picked), _rows(head)):
        slopes = _Slopes(grads, head, other, padded(picked[rows])[:, None], results, rows, padded(live[rows]))
        states, count = slopes.states, rows.stop - rows.start
        turned = states.T.contiguous() if of_weight is not None else None  # once, not in every product
        own = None
        for part in chunks(head.size, COLUMNS):
            slope = slopes.tile(part)  # [m, n]
            if of_hidden is not None and head.weight is None:
                of_hidden[rows, part] = slope[:count]
            elif of_hidden is not None:
                product = _product(slope, head.matrix(part).T)
                own = product if own is None else own.add_(product)
            if of_weight is not None and turned is not None:
                for piece in chunks(slope.shape[1], max(128, PIECE // max(1, states.shape[1]))):
                    of_weight[part][piece].add_(_product(slope[:, piece].T, turned))
            if of_bias is not None:
                of_bias[part].add_(slope.sum(0))
        if of_hidden is not None and own is not None:
            of_hidden[rows] = own[:count]
    found: list[torch.Tensor] = []
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
    """The largest logit of each row so far, and sums over the logits less the largest; all (m, 1).

    Attributes:
        peak: the largest logit.
        count: how many logits there were, a number.
        plain: the sum of what they are less the largest; None if not asked for.
        total: the sum of the exponentials of that.
        along: the sum of both multiplied.
    """

    def __init__(self, states: torch.Tensor, mean: bool = False) -> None:
        self.peak = states.new_full((len(states), 1), IMPOSSIBLE)
        self.total, self.along = states.new_zeros(len(states), 1), states.new_zeros(len(states), 1)
        self.plain = states.new_zeros(len(states), 1) if mean else None
        self.count = 0

    def centre(self, logits: torch.Tensor) -> torch.Tensor:
        """Make a tile's logits those less the largest, which they may raise. Returns by how much, 0 or less."""
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        step = self.peak - peak
        self.peak = peak
        logits.sub_(peak)
        return step

    def add(self, centred: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a tile, which is used up. Returns its exponentials and what earlier ones are worth now."""
        if self.plain is not None:
            self.plain = self.plain + step * self.count + centred.sum(-1, keepdim=True)
        self.count += centred.shape[1]
        decay = step.exp()
        powers = centred.exp()
        along = centred.mul_(powers).sum(-1, keepdim=True)
        self.along = decay * (self.along + step * self.total) + along
        self.total = decay * self.total + powers.sum(-1, keepdim=True)
        return powers, decay

    def log(self) -> torch.Tensor:
        """Of the total; NaN where no logit is above minus infinity."""
        return torch.where(self.peak > IMPOSSIBLE, self.total.log(), math.nan)


def _score(
    head: _Head, other: _Head | None, tokens: torch.Tensor, rows: slice, mean: bool
) -> tuple[torch.Tensor | None, ...]:
    """What `forward` returns of a chunk; its tokens (m, 1) are padded."""
    states = head.states(rows)
    own, gap = states.new_zeros(len(states), 1), states.new_zeros(len(states), 1)
    softmax = _Softmax(states, mean)
    if other is not None:
        other_states = other.states(rows)
        other_softmax = _Softmax(other_states)
    for part in chunks(head.size, COLUMNS):
        logits = head.finite_tile(states, part)
        place = tokens - part.start
        inside = (place >= 0) & (place < logits.shape[1])
        own = torch.where(inside, logits.gather(-1, place.clamp(0, logits.shape[1] - 1)), own)
        step = softmax.centre(logits)
        if other is None:
            softmax.add(logits, step)
            continue
        other_logits = other.finite_tile(other_states, part)
        other_step = other_softmax.centre(other_logits)
        difference = logits - other_logits
        earlier = gap + (step - other_step) * softmax.total
        other_softmax.add(other_logits, other_step)
        powers, decay = softmax.add(logits, step)
        gap = decay * earlier + difference.mul_(powers).sum(-1, keepdim=True)
    log = softmax.log()
    sums = [softmax.peak, log]
    if other is not None:
        sums += [other_softmax.peak, other_softmax.log()]
    own.masked_fill_(own <= IMPOSSIBLE, -math.inf)
    return (
        (own - softmax.peak - log)[:, 0],
        (log - softmax.along / softmax.total)[:, 0],
        None if other is None else (gap / softmax.total - log + sums[3])[:, 0],
        None if softmax.plain is None else (softmax.plain / head.size - log)[:, 0],
        torch.stack(sums)[..., 0],
    )


class _Slopes:
    """Gradients of a chunk's logits, 0 in padded rows and in those that are not live.

    With the gradients g of the reference's formulas the slope is p_j (a l_j - g_KL q_j + c), a = g_KL - g_H, and two
    terms that stand alone: g_l at the token and g_A / V everywhere. Logits are taken less the largest, x_j, and the
    logarithm of the sum of their exponentials goes into the constants: p_j = exp(x_j) exp(-log).

    Attributes:
        states: (m, E), with zeros in the rows left out.
    """

    def __init__(
        self,
        grads: Sequence[torch.Tensor | None],
        head: _Head,
        other: _Head | None,
        tokens: torch.Tensor,
        results: Sequence[torch.Tensor],
        rows: slice,
        live: torch.Tensor,
    ) -> None:
        def column(values: torch.Tensor) -> torch.Tensor:
            return padded(values.reshape(-1, 1)[rows].to(head.dtype))

        self.head, self.other, self.tokens = head, other, tokens
        self.dead = None if live.all() else ~live
        self.states = head.states(rows) if self.dead is None else head.states(rows).masked_fill(self.dead, 0)
        self.other_states = None if other is None else other.states(rows)
        self.peak, log, *others = (column(sums) for sums in results[4])
        given = [None if g is None or not g.numel() else column(g) / head.temperature for g in grads[:4]]
        self.of_own, of_entropy, of_kl, self.of_mean = given
        zero = head.rows.new_zeros(len(tokens), 1, dtype=head.dtype)
        constant, along = zero.clone(), None
        for gradient in (self.of_own, self.of_mean):
            if gradient is not None:
                constant -= gradient
        if of_entropy is not None or of_kl is not None:
            along = zero
        if of_entropy is not None:
            along = along - of_entropy
            constant -= of_entropy * column(results[1])
        if of_kl is not None:
            along = along + of_kl
            constant -= of_kl * column(results[2])
        scale = (-log).exp()
        if along is not None:
            constant -= along * log
        if of_kl is not None and other is not None:
            self.other_peak, other_log = others
            constant += of_kl * other_log
            self.of_kl = of_kl * scale
        self.constant, self.along = constant * scale, None if along is None else along * scale

    def tile(self, part: slice) -> torch.Tensor:
        """Of some columns (m, n)."""
        if self.along is None:
            slope = self.head.tile(self.states, part).sub_(self.peak).exp_().mul_(self.constant)
        else:
            centred = self.head.finite_tile(self.states, part).sub_(self.peak)
            slope = centred.exp()
            factor = centred.mul_(self.along).add_(self.constant)
            if self.other is not None:
                others = self.other.finite_tile(self.other_states, part).sub_(self.other_peak)
                factor.sub_(others.mul_(self.of_kl))
            slope.mul_(factor)
        if self.of_mean is not None:
            slope += self.of_mean / self.head.size
        if self.of_own is not None:
            place = self.tokens - part.start
            inside = (place >= 0) & (place < slope.shape[1])
            slope.scatter_add_(-1, place.clamp(0, slope.shape[1] - 1), torch.where(inside, self.of_own, 0))
        return slope if self.dead is None else slope.masked_fill_(self.dead, 0)


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
