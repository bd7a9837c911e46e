"""Log-probability, entropy and KL of tokens in PyTorch: tiles of logits, which stay in a CPU's cache.

A tile is some rows times some of the vocabulary. Forward, the softmax's sums go from tile to tile; backward, the
gradient of a tile's logits follows from the sums of the forward pass and is used up at once. Bits have few logits: a
tile is some rows with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs import losses
from fastvar.kernels.token_log_probs.losses import Grads, Results, Scoring, TwoPasses

if TYPE_CHECKING:
    from fastvar.ops.token_log_probs import Head

# Tiles of many rows read the weight, turn it round and add to its gradient less often. Larger tiles are little faster
# and take more memory: from 1 MiB on malloc needs twice as much of it.
COLUMNS = 512  # of a tile, at most
TILE = 3 * 2**16  # logits of a tile, 384 rows
ROWS = 1024  # of a tile, at most
PIECE = 3 * 2**16  # elements of the weight's gradient that a product gives at a time, or 128 rows
BIT_ROWS = 256  # of a tile of bits
STEP = 16  # tiles are padded to a multiple of rows: matrix products of very few may sum in another order
IMPOSSIBLE = -1e30  # stands for minus infinity in sums: 0 * log 0 is 0. The token's own log-probability is infinite


def score(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """See `TwoPasses`."""
    head = _Head(scoring.head, scoring.temperature)
    other = None if scoring.reference is None else _Head(scoring.reference, scoring.temperature)
    losses.check_range(scoring.tokens, head.size)
    results, picked = _room(scoring), scoring.tokens.flatten(0, 1)
    if scoring.tokens.ndim == 3:
        for rows in _chunks(len(picked), BIT_ROWS):
            others = None if other is None else other.whole(rows)[1]
            _write(results, rows, _score_bits(head.whole(rows)[1], _padded(picked[rows]), others))
        return results
    for rows in _chunks(len(picked), _rows(head)):
        _write(results, rows, _score_tokens(head, other, _padded(picked[rows].long())[:, None], rows, scoring.mean))
    return results


def gradients(
    scoring: Scoring, results: Results, grads: Grads, needs: Any, unrounded: bool = False
) -> dict[str, torch.Tensor]:
    """See `TwoPasses`; the logits of each tile are computed anew."""
    hidden, weight, bias = scoring.head
    head = _Head(scoring.head, scoring.temperature)
    other = None
    if scoring.reference is not None and grads[2] is not None:
        other = _Head(scoring.reference, scoring.temperature)
    picked, bits = scoring.tokens.flatten(0, 1), scoring.tokens.ndim == 3
    of_hidden = of_weight = of_bias = None
    if needs.head_hidden:
        of_hidden = head.rows.new_empty(head.rows.shape, dtype=losses.unrounded(hidden.dtype) if unrounded else None)
    if needs.head_weight and weight is not None:
        of_weight = weight.new_zeros(weight.shape, dtype=head.dtype)
    if needs.head_bias and bias is not None:
        of_bias = bias.new_zeros(bias.shape, dtype=head.dtype)
    live = _live_rows(grads, scoring.tokens)
    for rows in _chunks(len(picked), BIT_ROWS if bits else _rows(head)):
        alive, tokens = _padded(live[rows]), _padded(picked[rows])
        slopes: _Slopes | _BitSlopes
        if bits:
            slopes = _BitSlopes(grads, head, other, tokens, rows, alive)
        else:
            slopes = _Slopes(grads, head, other, tokens.long()[:, None], results, rows, alive)
        states, count = slopes.states, rows.stop - rows.start
        turned = states.T.contiguous() if of_weight is not None else None  # once, not in every product
        own = None
        for part in _chunks(head.size, head.columns):
            slope = slopes.tile(part)  # [m, n]
            if of_hidden is not None and head.weight is None:
                of_hidden[rows, part] = slope[:count]
            elif of_hidden is not None:
                product = _product(slope, head.matrix(part).T)
                own = product if own is None else own.add_(product)
            if of_weight is not None and turned is not None:
                for piece in _chunks(slope.shape[1], max(128, PIECE // max(1, states.shape[1]))):
                    of_weight[part][piece].add_(_product(slope[:, piece].T, turned))
            if of_bias is not None:
                of_bias[part].add_(slope.sum(0))
        if of_hidden is not None and own is not None:
            of_hidden[rows] = own[:count]
    found: dict[str, torch.Tensor] = {}
    if of_hidden is not None:
        found["head_hidden"] = of_hidden.view(hidden.shape)
    if of_weight is not None and weight is not None:
        found["head_weight"] = of_weight if unrounded else of_weight.to(weight.dtype)
    if of_bias is not None and bias is not None:
        found["head_bias"] = of_bias if unrounded else of_bias.to(bias.dtype)
    return found


_FUNCTIONS = TwoPasses(score, gradients)
forward, backward = _FUNCTIONS.forward, _FUNCTIONS.backward
policy_loss, cross_entropy = _FUNCTIONS.policy_loss, _FUNCTIONS.cross_entropy


class _Head:
    """Tiles of logits."""

    def __init__(self, head: Head, temperature: float) -> None:
        hidden, weight, bias = head
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.rows = hidden.flatten(0, 1)  # [M, E]
        self.weight, self.bias, self.temperature = weight, bias, temperature
        self.size = hidden.shape[-1] if weight is None else len(weight)
        # a GPU takes whole rows, as a launch costs more than what a cache saves
        self.columns = COLUMNS if hidden.device.type == "cpu" else max(self.size, 1)

    def states(self, rows: slice) -> torch.Tensor:
        """A chunk's rows (m, E), padded."""
        return _padded(self.rows[rows].to(self.dtype))

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

    def whole(self, rows: slice, live: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's rows, zeros where they are not live, and their logits."""
        states = self.states(rows)
        states = states if live is None else torch.where(live, states, 0)
        return states, self.tile(states, slice(0, self.size))

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
        """The log of the total; NaN where no logit is above minus infinity."""
        return torch.where(self.peak > IMPOSSIBLE, self.total.log(), math.nan)


def _score_tokens(
    head: _Head, other: _Head | None, tokens: torch.Tensor, rows: slice, mean: bool
) -> tuple[torch.Tensor | None, ...]:
    """What `score` returns of a chunk; its tokens (m, 1) are padded."""
    states = head.states(rows)
    own, gap = states.new_zeros(len(states), 1), states.new_zeros(len(states), 1)
    softmax = _Softmax(states, mean)
    if other is not None:
        other_states = other.states(rows)
        other_softmax = _Softmax(other_states)
    for part in _chunks(head.size, head.columns):
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
        grads: Grads,
        head: _Head,
        other: _Head | None,
        tokens: torch.Tensor,
        results: Results,
        rows: slice,
        live: torch.Tensor,
    ) -> None:
        def column(values: torch.Tensor) -> torch.Tensor:
            return _padded(values.reshape(-1, 1)[rows].to(head.dtype))

        self.head, self.other, self.tokens = head, other, tokens
        self.dead: torch.Tensor | None
        self.dead = ~live
        if live.device.type == "cpu" and live.all():  # elsewhere the question would wait for the device
            self.dead = None
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
        """The slopes of some columns (m, n)."""
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


class _BitSlopes:
    """As `_Slopes`, of bits (m, d): a tile is the whole."""

    def __init__(
        self, grads: Grads, head: _Head, other: _Head | None, bits: torch.Tensor, rows: slice, live: torch.Tensor
    ) -> None:
        self.states, logits = head.whole(rows, live)
        others = None if other is None else other.whole(rows, live)[1]
        # under torch.compile results that nobody used, even empty ones, have gradients of zeros
        given = [
            None if g is None or not g.numel() else _padded(g.reshape(-1, 1)[rows].to(head.dtype)) for g in grads[:4]
        ]
        self.slope = _slopes_bits(logits, bits, others, given) / head.temperature

    def tile(self, part: slice) -> torch.Tensor:
        """The slopes of some columns (m, n)."""
        return self.slope[:, part]


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
    grads: Grads,
) -> torch.Tensor:
    of_own, of_entropy, of_kl, of_mean = grads
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


def _room(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """What `score` returns, yet to be filled."""
    shape, reference, hidden = scoring.tokens.shape[:2], scoring.reference is not None, scoring.head.hidden
    sums = 0 if scoring.tokens.ndim == 3 else 2 + 2 * reference
    shapes = (shape, shape, shape if reference else (0,), shape if scoring.mean else (0,), (sums, *shape))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(torch.empty(each, dtype=dtype, device=hidden.device) for each in shapes)


def _write(results: Sequence[torch.Tensor], rows: slice, found: Sequence[torch.Tensor | None]) -> None:
    """Put what was found for a padded chunk into its rows of the results."""
    for result, values in zip(results, found, strict=True):
        if values is not None and result.numel():
            result.flatten(-2)[..., rows] = values[..., : rows.stop - rows.start]


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % STEP
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _live_rows(grads: Sequence[torch.Tensor | None], tokens: torch.Tensor) -> torch.Tensor:
    """(M, 1) rows that have an incoming gradient other than 0."""
    live = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for gradient in grads[:4]:
        if gradient is not None and gradient.numel():
            live |= gradient != 0
    return live.view(-1, 1)


def _rows(head: _Head) -> int:
    """Rows of a tile. They follow from the vocabulary alone, so that tiles begin at the same rows in any batch."""
    room = TILE if head.rows.device.type == "cpu" else 8 * TILE
    return max(min(room // min(max(head.size, 1), head.columns) // 16 * 16, ROWS), 16)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. PyTorch itself asks MKL for float32 products, which on AMD processors takes twice as long.
    Neither lets a row's result depend on the other rows."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.enabled and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
