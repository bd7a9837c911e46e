"""Log-probability, entropy and KL of tokens in PyTorch, some rows of logits at a time.

A chunk is some rows with the whole vocabulary. A loss whose gradient each token decides alone takes it from the logits
that are there: three products. Otherwise the logits are computed again for the gradient: four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs import checks, losses
from fastvar.kernels.token_log_probs.losses import Grads, Scoring, TwoPasses, Wanted
from fastvar.kernels.token_log_probs.policy import Policy

if TYPE_CHECKING:
    from fastvar.ops.cross_entropy import CrossEntropyCall
    from fastvar.ops.policy_loss import PolicyLossCall
    from fastvar.ops.token_log_probs import Head

# Chunks of many rows read the weight and add to its gradient less often.
LOGITS = 2**21  # of a chunk, 8 MiB in float32; or 16 rows
ROWS = 1024  # of a chunk, at most
PIECE = 3 * 2**16  # elements of the weight's gradient that oneDNN gives at a time, or 128 rows
STEP = 16  # chunks are padded to a multiple of rows: matrix products of very few may sum in another order
IMPOSSIBLE = -1e30  # stands for minus infinity in sums: 0 * log 0 is 0. The token's own log-probability is infinite

NONE = Wanted(False, False, False)

# From a chunk's rows, log-probabilities, entropies and KL to the gradients of these and of the mean log-probability
Incoming = Callable[[slice, Sequence[torch.Tensor | None]], Grads]


def score(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """See `TwoPasses`."""
    return _run(scoring)[0]


def gradients(scoring: Scoring, grads: Grads, needs: Any, unrounded: bool = False) -> dict[str, torch.Tensor]:
    """See `TwoPasses`; the logits of each chunk are computed anew."""
    return _run(scoring, _given(grads), needs, unrounded, keep=False)[1]


_FUNCTIONS = TwoPasses(score, gradients)
forward, backward = _FUNCTIONS.forward, _FUNCTIONS.backward


def cross_entropy(call: CrossEntropyCall) -> tuple[torch.Tensor, ...]:
    """The loss (), each token's and its entropy (B, L), and three gradients, empty where not wanted; in one pass."""
    scoring = Scoring(call.head, call.tokens, mean=call.label_smoothing > 0)
    share = losses.shares(call.weights, call.tokens, _dtype(call.head))
    wanted = Wanted(*call.needs)
    results, found = _run(scoring, _given(losses.of_scores(share, call.label_smoothing)), wanted, unrounded=True)
    return (*losses.smoothed(results, share, call.label_smoothing), *losses.three(found, wanted, results[0]))


def policy_loss(call: PolicyLossCall) -> tuple[torch.Tensor, ...]:
    """See `TwoPasses`; in one pass, unless a ratio belongs to many tokens."""
    if call.options.ratio_level != "token" or not any(call.needs):
        return _FUNCTIONS.policy_loss(call)
    scoring = Scoring(call.head, call.tokens, call.reference, call.temperature)
    wanted = Wanted(*call.needs)
    policy = Policy(call, _dtype(call.head))
    results, found = _run(scoring, policy.incoming, wanted, unrounded=True)
    *measured, _ = policy.measure(results[0], results[1], None if call.reference is None else results[2])
    return (*measured, results[0], *losses.three(found, wanted, results[0]))


def _run(
    scoring: Scoring,
    incoming: Incoming | None = None,
    needs: Any = NONE,
    unrounded: bool = False,
    keep: bool = True,
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Results, if they are to be kept, and the gradients that are needed for those that come in."""
    head = _Head(scoring.head, scoring.temperature)
    other = None if scoring.reference is None else _Head(scoring.reference, scoring.temperature)
    checks.check_range(scoring.tokens, head.size)
    results, tokens = _room(scoring), scoring.tokens.flatten(0, 1)
    sums = _Gradients(head, needs, unrounded) if any(needs) else None
    kind = _Bits if scoring.tokens.ndim == 3 else _Classes
    for rows in _chunks(len(tokens), head.rows_at_once):
        chunk = kind(head, other, rows, _padded(tokens[rows]), scoring.mean)
        found = chunk.results()
        if keep:
            _write(results, rows, found)
        if sums is not None and incoming is not None:
            count = rows.stop - rows.start
            given = incoming(rows, [None if each is None else each[:count] for each in found[:3]])
            slope, live = chunk.slopes(_columns(given, head))
            sums.add(rows, chunk.states, slope, live)
    return results, {} if sums is None else sums.found(scoring.head)


def _given(grads: Grads) -> Incoming:
    """Gradients that are known before; under torch.compile results that nobody used, even empty ones, have some."""
    flat = [None if grad is None or not grad.numel() else grad.reshape(-1) for grad in grads[:4]]
    return lambda rows, _: [None if grad is None else grad[rows] for grad in flat]


class _Head:
    """Rows of logits."""

    def __init__(self, head: Head, temperature: float) -> None:
        hidden, weight, bias = head
        self.dtype = _dtype(head)
        self.rows = hidden.flatten(0, 1)  # [M, E]
        # a weight in 16 bits is copied whole; oneDNN takes a thousand times as long for slices
        self.weight = None if weight is None else weight.to(self.dtype).contiguous()
        self.bias = None if bias is None else bias.to(self.dtype)
        self.temperature = temperature
        self.size = hidden.shape[-1] if weight is None else len(weight)
        # of the vocabulary alone, so that chunks begin at the same rows in any batch; a launch costs a GPU more
        room = LOGITS if hidden.device.type == "cpu" else 8 * LOGITS
        self.rows_at_once = max(min(room // max(self.size, 1) // STEP * STEP, ROWS), STEP)

    def states(self, rows: slice) -> torch.Tensor:
        """A chunk's rows (m, E), padded."""
        return _padded(self.rows[rows].to(self.dtype))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (m, V) divided by the temperature; to be written to."""
        logits = states.clone() if self.weight is None else _product(states, self.weight, self.bias)
        return logits if self.temperature == 1 else logits.div_(self.temperature)


class _Gradients:
    """Gradients of a head, to which each chunk adds its own."""

    def __init__(self, head: _Head, needs: Any, unrounded: bool) -> None:
        self.head, self.unrounded = head, unrounded
        self.hidden = self.weight = self.bias = None
        if needs.head_hidden:
            dtype = losses.unrounded(head.rows.dtype) if unrounded else None
            self.hidden = head.rows.new_empty(head.rows.shape, dtype=dtype)
        if needs.head_weight and head.weight is not None:
            self.weight = torch.zeros_like(head.weight)
        if needs.head_bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias)

    def add(self, rows: slice, states: torch.Tensor, slope: torch.Tensor, live: torch.Tensor | None) -> None:
        """Slopes (m, V) of a chunk's logits, with zeros in rows that are not live (all are where it is None)."""
        count = rows.stop - rows.start
        if self.hidden is not None:
            weight = self.head.weight
            self.hidden[rows] = (slope if weight is None else _product(slope, weight.T))[:count]
        if self.weight is not None:
            _add_product(self.weight, slope, states if live is None else torch.where(live, states, 0))
        if self.bias is not None:
            self.bias.add_(slope.sum(0))

    def found(self, head: Head) -> dict[str, torch.Tensor]:
        """By name."""
        found: dict[str, torch.Tensor] = {}
        if self.hidden is not None:
            found["head_hidden"] = self.hidden.view(head.hidden.shape)
        for name, gradient, leaf in (("weight", self.weight, head.weight), ("bias", self.bias, head.bias)):
            if gradient is not None and leaf is not None:
                found[f"head_{name}"] = gradient if self.unrounded else gradient.to(leaf.dtype)
        return found


class _Softmax:
    """Logits x (m, V) less the largest, exponentials of that, and their sum.

    Attributes:
        peak: (m, 1), the largest logit.
        centred: (m, V), `IMPOSSIBLE` for minus infinity: 0 times its exponential is then 0.
        powers: (m, V).
        total, log: (m, 1), the sum of the powers and its logarithm; both NaN where no logit is above minus infinity.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.centred = logits.clamp_min_(IMPOSSIBLE)
        self.peak = logits.amax(-1, keepdim=True)
        self.centred.sub_(self.peak)
        self.powers = self.centred.exp()
        self.total = torch.where(self.peak > IMPOSSIBLE, self.powers.sum(-1, keepdim=True), math.nan)
        self.log = self.total.log()


class _Classes:
    """A chunk of tokens of a codebook."""

    def __init__(self, head: _Head, other: _Head | None, rows: slice, tokens: torch.Tensor, mean: bool) -> None:
        self.states, self.tokens, self.mean = head.states(rows), tokens.long()[:, None], mean
        logits = head.logits(self.states)
        self.own = logits.gather(-1, self.tokens)
        self.softmax = _Softmax(logits)
        self.other = None if other is None else _Softmax(other.logits(other.states(rows)))
        if self.other is not None:
            del self.other.powers  # as large as the logits, and of no use

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """What `score` returns of the padded chunk."""
        softmax, other, kl, mean = self.softmax, self.other, None, None
        self.entropy = softmax.log - _dot(softmax.powers, softmax.centred) / softmax.total
        if other is not None:
            gap = _dot(softmax.powers, softmax.centred - other.centred)
            kl = self.kl = gap / softmax.total - softmax.log + other.log
        if self.mean:
            mean = (softmax.centred.mean(-1, keepdim=True) - softmax.log)[:, 0]
        own = self.own - softmax.peak - softmax.log
        return own[:, 0], self.entropy[:, 0], None if kl is None else kl[:, 0], mean

    def slopes(self, given: Grads) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the logits (m, V), which take the place of the exponentials, and which rows (m, 1) are live.

        With the gradients g of the results the slope is p_j (a l_j - g_KL q_j + c), a = g_KL - g_H, and two terms that
        stand alone: g_l at the token and g_A / V everywhere. l_j and q_j, logarithms of the probabilities, are x_j less
        the log of the sum, which goes into c; the sum itself goes into both factors. What is impossible is a constant
        in the mean: it gets none of g_A, and c has only the others' share of it.
        """
        of_own, of_entropy, of_kl, of_mean = given
        softmax, other = self.softmax, self.other
        constant, along, of_possible = torch.zeros_like(softmax.total), None, None
        if of_own is not None:
            constant -= of_own
        if of_mean is not None:
            of_possible = (softmax.centred > IMPOSSIBLE) * (of_mean / softmax.centred.shape[1])
            constant -= of_possible.sum(-1, keepdim=True)
        if of_entropy is not None:
            along = -of_entropy
            constant -= of_entropy * self.entropy
        if of_kl is not None and other is not None:
            along = of_kl if along is None else along + of_kl
            constant += of_kl * (other.log - self.kl)
        slope = softmax.powers
        if along is None:
            slope.mul_(constant / softmax.total)
        else:
            factor = softmax.centred.mul_(along / softmax.total).add_((constant - along * softmax.log) / softmax.total)
            if of_kl is not None and other is not None:
                factor.sub_(other.centred.mul_(of_kl / softmax.total))
            slope.mul_(factor)
        if of_possible is not None:
            slope += of_possible
        if of_own is not None:
            slope.scatter_add_(-1, self.tokens, of_own)
        return _only_live(slope, given)


class _Bits:
    """A chunk of tokens of bits.

    z is the difference logit, s = sigmoid(z), y the difference logit of the reference. Not torch.sigmoid, whose last
    digit depends on an element's place in the tensor. Infinite z make bits certain; here they are finite, so that 0
    times them is 0, save that the log-probability of the other value is minus infinity.

        l: dl/dz = bit - s                  H: dH/dz = -z s (1 - s)
        KL: dKL/dz = (z - y) s (1 - s)      A: dA/dz = (1 - s - s) / 2, 0 where z is infinite
    """

    def __init__(self, head: _Head, other: _Head | None, rows: slice, tokens: torch.Tensor, mean: bool) -> None:
        self.states, self.bits, self.mean = head.states(rows), tokens != 0, mean
        self.logits = head.logits(self.states)
        self.others = None if other is None else _finite(other.logits(other.states(rows)))

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """As `_Classes`."""
        own = F.logsigmoid(torch.where(self.bits, self.logits, -self.logits)).sum(-1)
        self.logits = _finite(self.logits)
        one, zero = F.logsigmoid(self.logits), F.logsigmoid(-self.logits)
        entropy, kl, mean = -(one.exp() * one + zero.exp() * zero).sum(-1), None, None
        if self.others is not None:
            gap = one.exp() * (one - F.logsigmoid(self.others)) + zero.exp() * (zero - F.logsigmoid(-self.others))
            kl = gap.sum(-1)
        if self.mean:
            mean = (one + zero).sum(-1) / 2
        return own, entropy, kl, mean

    def slopes(self, given: Grads) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_Classes`."""
        of_own, of_entropy, of_kl, of_mean = given
        logits = self.logits
        one, zero = 1 / (1 + (-logits).exp()), 1 / (1 + logits.exp())
        slope = torch.zeros_like(logits) if of_own is None else of_own * torch.where(self.bits, zero, -one)
        if of_entropy is not None:
            slope = slope - of_entropy * (logits * (one * zero))
        if of_kl is not None and self.others is not None:
            slope = slope + of_kl * ((logits - self.others) * (one * zero))
        if of_mean is not None:
            slope = slope + of_mean * torch.where(logits.abs() < -IMPOSSIBLE, (zero - one) / 2, 0)
        return _only_live(slope, given)


def _only_live(slope: torch.Tensor, given: Grads) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows without an incoming gradient get no slope, whatever stands in them, NaN included."""
    dead = torch.stack([gradient == 0 for gradient in given if gradient is not None]).all(0)
    if dead.device.type == "cpu" and not dead.any():  # elsewhere the question would wait for the device
        return slope, None
    return slope.masked_fill_(dead, 0), ~dead


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.clamp(IMPOSSIBLE, -IMPOSSIBLE)


def _columns(given: Grads, head: _Head) -> list[torch.Tensor | None]:
    """Gradients (m,) as padded columns (m, 1), with respect to logits before the temperature."""
    return [None if g is None else _padded(g.to(head.dtype)[:, None] / head.temperature) for g in given]


def _room(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """What `score` returns, yet to be filled."""
    shape, reference = scoring.tokens.shape[:2], scoring.reference is not None
    shapes = (shape, shape, shape if reference else (0,), shape if scoring.mean else (0,))
    like = {"dtype": _dtype(scoring.head), "device": scoring.tokens.device}
    return tuple(torch.empty(each, **like) for each in shapes)


def _dtype(head: Head) -> torch.dtype:
    """Of results."""
    return torch.promote_types(head.hidden.dtype, torch.float32)


def _write(results: Sequence[torch.Tensor], rows: slice, found: Sequence[torch.Tensor | None]) -> None:
    """Put what was found for a padded chunk into its rows of the results."""
    for result, values in zip(results, found, strict=True):
        if values is not None and result.numel():
            result.view(-1)[rows] = values[: rows.stop - rows.start]


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % STEP
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(m, 1) of (m, V), without a product in memory."""
    return torch.linalg.vecdot(x, y)[:, None]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. PyTorch asks MKL for float32 products, of which a row may depend on how many rows there are;
    of oneDNN's it does not."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """total (n, E) += x^T y of x (m, n) and y (m, E), where all rows are summed: MKL adds in place, but takes twice as
    long as oneDNN on other processors than Intel's."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn() and not _on_intel():
        turned = y.T.contiguous()  # once, not in every product
        for piece in _chunks(len(total), max(128, PIECE // max(1, y.shape[1]))):
            total[piece].add_(_product(x[:, piece].T, turned))
    else:
        total.addmm_(x.T, y)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _on_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
