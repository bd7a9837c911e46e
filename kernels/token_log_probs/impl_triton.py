"""Log-probability, entropy and KL of tokens and the losses made of them, in Triton: the logits of some rows at a time.

Those logits are a plain product, which cuBLAS does best, in float32 and of a bounded number of rows. A kernel reads
them once and has all that a row needs in registers: statistics, the terms of a loss and the slopes, gradients of the
logits. Two more plain products take the slopes to hidden states and weight. So a loss and its gradient take three
products, and scoring takes one.

A product always has the same number of rows, the last one padded, so that cuBLAS always takes the same kernel, in which
no row looks at another: a token's log-probability does not depend on the batch, and scoring and training run the same
operations in the same order. Products of float32 follow torch.set_float32_matmul_precision, as a linear layer's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastvar.kernels.common.exponential import exp
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import card, cdiv, power_of_2
from fastvar.kernels.token_log_probs import losses
from fastvar.kernels.token_log_probs.losses import Grads, Scoring, TwoPasses, Wanted, three
from fastvar.kernels.token_log_probs.policy_triton import Policy, estimate, surrogate
from fastvar.kernels.token_log_probs.tiles import LOGITS

if TYPE_CHECKING:
    from fastvar.ops.cross_entropy import CrossEntropyCall
    from fastvar.ops.policy_loss import PolicyLossCall
    from fastvar.ops.token_log_probs import Head

IMPOSSIBLE = tl.constexpr(-1e30)  # stands for minus infinity: 0 * log 0 is 0
PRODUCT = 2**25  # logits of a product: 128 MiB
ROWS = (512, 3968)  # of a product; fewer would read the weight too often. A launch costs the host as much as 1000 rows
SLOPES = 2**26  # logits that slopes take the place of: 256 MiB
SLOPE_ROWS = (1024, 3968)  # but not fewer rows and no more: the weight's gradient is added to once for so many
SHARE = 8  # nor more than this part of all rows, in whole products: else a small batch has all its slopes in memory
LARGEST = 2.0**8  # of scaled slopes, per nat: float16 has room for gaps of 255 nats above, for 2**-32 of it below


@triton.jit
def _logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile [M, V] of logits divided by the temperature, with IMPOSSIBLE for minus infinity and past V."""
    z_at = z_ptr + place[:, None] * z_m + column.to(tl.int64)[None, :] * z_v
    z = tl.load(z_at) if V % BLOCK_V == 0 else tl.load(z_at, (column < V)[None, :], 0.0)
    z = z.to(tl.float32)
    if b_ptr is not None:
        z += tl.load(b_ptr + column, column < V, 0.0).to(tl.float32)[None, :]
    z = z * factor
    z = tl.where(z < IMPOSSIBLE, IMPOSSIBLE, z)
    if V % BLOCK_V != 0:
        z = tl.where((column < V)[None, :], z, IMPOSSIBLE)
    return z


@triton.jit
def _highest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _log(total, peak):
    """NaN where no logit is above minus infinity."""
    return tl.where(peak > IMPOSSIBLE, tl.log(total), float("nan"))


@triton.jit
def _load(ptr, row):
    """Numbers of rows [M]; 0 where there are none."""
    if ptr is None:
        return tl.zeros(row.shape, tl.float32)
    else:
        return tl.load(ptr + row).to(tl.float32)


@triton.jit
def _given(
    row, of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr, reference_ptr, L
):  # fmt: skip
    """What the coefficients of rows [M] are made of, loaded before the logits come: nothing waits for it later."""
    sample = row
    if advantage_ptr is not None:
        sample = row.to(tl.int32) // L
    return (
        _load(of_own_ptr, row), _load(of_entropy_ptr, row), _load(of_kl_ptr, row), _load(of_mean_ptr, row),
        _load(share_ptr, row), _load(advantage_ptr, sample), _load(old_ptr, row), _load(reference_ptr, row),
    )  # fmt: skip


@triton.jit
def _coefficients(
    score, given, share_ptr, old_ptr, reference_ptr, low, high, kl_weight, entropy_weight,
    ESTIMATOR: tl.constexpr, EXACT: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """Gradients of a loss with respect to the log-probability, the entropy, the KL and the mean of rows [M]: those
    given or, with shares, those of the policy loss, whose other scores are `score`."""
    own, of_entropy, of_kl, mean, share, gain, old, reference = given
    if share_ptr is not None:
        trained = share > 0
        ratio = tl.zeros_like(score) + 1.0
        if old_ptr is not None:
            ratio = tl.exp(tl.where(trained, score - old, 0.0))
        _, push, _ = surrogate(ratio, gain, trained, low, high)
        own = -share * push
        if reference_ptr is not None:
            gap = tl.where(trained, reference - score, 0.0)
            _, pull = estimate(gap, ESTIMATOR)
            own -= tl.where(kl_weight != 0, kl_weight * share * pull, 0.0)
        if EXACT:
            of_kl = kl_weight * share
        if BONUS:
            of_entropy = -entropy_weight * share
    live = (own != 0) | (of_entropy != 0) | (of_kl != 0) | (mean != 0)
    return own, of_entropy, of_kl, mean, live


@triton.jit
def _copy_states(
    h_ptr, state_ptr, row, place, valid, live, h_m, h_e,
    E: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Hidden states of live rows, zeros for the others, whatever stands there, with a 1 behind those of live rows if
    there is room: its product with the slopes is the bias's gradient."""
    for start in range(0, STRIDE, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        h_at = h_ptr + row[:, None] * h_m + e.to(tl.int64)[None, :] * h_e
        h = tl.load(h_at, live[:, None] & (e < E)[None, :], 0.0).to(tl.float32)
        if STRIDE > E:
            h = tl.where((e == E)[None, :] & live[:, None], 1.0, h)
        at = state_ptr + place[:, None] * STRIDE + e[None, :]
        tl.store(at, h, valid[:, None] & (e < STRIDE)[None, :])


@triton.jit
def _lay_out(like_ptr, place, values, never, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """A store that is never carried out. It has the compiler give a thread the same logits as where slopes are stored,
    so that sums are added up in the same order: a policy's ratio to itself is exactly 1."""
    column = tl.arange(0, BLOCK_V)
    at = like_ptr + place[:, None] * V + column[None, :]
    tl.store(at, values, never & (place >= 0)[:, None] & (column < V)[None, :])


@kernel(do_not_specialize=["first", "count"])  # a lone row is summed as others are
def token_log_probs_fwd_kernel(
    z_ptr, b_ptr, y_ptr, c_ptr, token_ptr, own_ptr, entropy_ptr, kl_ptr, mean_ptr,
    of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr, reference_ptr,
    slope_ptr, scale_ptr, h_ptr, state_ptr, like_ptr,
    z_m, z_v, y_m, y_v, h_m, h_e, first, count, L, factor, low, high, kl_weight, entropy_weight,
    V: tl.constexpr, E: tl.constexpr, STRIDE: tl.constexpr, SLOPE_M: tl.constexpr, ESTIMATOR: tl.constexpr,
    EXACT: tl.constexpr, BONUS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + count`, whose logits are z_ptr (count, V) and, of the reference, y_ptr: results
    are written if there is room for them; gradients of the logits before the temperature to slope_ptr (count, V), times
    what scale_ptr (1) holds. 0 in rows whose coefficients are all 0. Slopes may lie where the logits do, a row's in the
    first bytes of its own."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = place < count
    place = tl.minimum(place, count - 1).to(tl.int64)
    row = first + place
    if V <= BLOCK_V:  # stays in registers
        column = tl.arange(0, BLOCK_V)
        z = _logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
        if y_ptr is not None:
            y = _logits(y_ptr, c_ptr, place, column, y_m, y_v, factor, V, BLOCK_V)
            other_centred = y
        centred = z
    token = tl.load(token_ptr + row)
    if slope_ptr is not None and V <= BLOCK_V:
        given = _given(
            row, of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr, reference_ptr, L
        )
    known = (token >= 0) & (token < V)
    own = tl.load(z_ptr + place * z_m + token * z_v, known, 0.0).to(tl.float32)
    if b_ptr is not None:
        own += tl.load(b_ptr + token, known, 0.0).to(tl.float32)
    own *= factor
    token = tl.where(known, token, -1).to(tl.int32)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), IMPOSSIBLE, tl.float32)
    total, along, mean, gap, possible = zero, zero, zero, zero, zero
    other_peak, other_total = peak, zero
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        if V > BLOCK_V:
            z = _logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
            if y_ptr is not None:
                y = _logits(y_ptr, c_ptr, place, column, y_m, y_v, factor, V, BLOCK_V)
        # sums of exp(z - peak), of that times z - peak and so on, which decay where the peak rises
        if y_ptr is None:
            highest = tl.maximum(peak, tl.max(z, 1))
        else:
            highest, other_highest = tl.reduce((z, y), 1, _highest)
            highest, other_highest = tl.maximum(peak, highest), tl.maximum(other_peak, other_highest)
        step = peak - highest
        decay = tl.exp(step)
        centred = z - highest[:, None]
        powers = exp(centred)
        if y_ptr is None:
            more, more_along = tl.reduce((powers, powers * centred), 1, _add_two)
        else:
            other_step = other_peak - other_highest
            other_centred = y - other_highest[:, None]
            more, more_along, more_gap, other_more = tl.reduce(
                (powers, powers * centred, powers * (centred - other_centred), exp(other_centred)), 1, _add_four
            )
            gap = decay * (gap + (step - other_step) * total) + more_gap
            other_peak, other_total = other_highest, tl.exp(other_step) * other_total + other_more
        along = decay * (along + step * total) + more_along
        peak, total = highest, decay * total + more
        if of_mean_ptr is not None:
            possible += tl.sum(tl.where(z > IMPOSSIBLE, 1.0, 0.0), 1)
        if mean_ptr is not None:
            mean += step * start + tl.sum(tl.where((column < V)[None, :], centred, 0.0), 1)
    log = _log(total, peak)
    entropy = log - along / total
    score = tl.where(own <= IMPOSSIBLE, float("-inf"), own) - peak - log
    kl, other_log = zero, zero
    if y_ptr is not None:
        other_log = _log(other_total, other_peak)
        kl = gap / total - log + other_log
    if own_ptr is not None:
        tl.store(own_ptr + row, score, valid)
        tl.store(entropy_ptr + row, entropy, valid)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean / V - log, valid)
        if y_ptr is not None:
            tl.store(kl_ptr + row, kl, valid)
    if slope_ptr is None:
        _lay_out(like_ptr, place, tl.zeros((BLOCK_M, BLOCK_V), tl.float32) + score[:, None], count < 0, V, BLOCK_V)
    else:
        if V > BLOCK_V:  # held all the while, they would take registers that the parts need
            given = _given(
                row, of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr,
                reference_ptr, L,
            )  # fmt: skip
        of_own, of_entropy, of_kl, of_mean, live = _coefficients(
            score, given, share_ptr, old_ptr, reference_ptr, low, high, kl_weight, entropy_weight, ESTIMATOR, EXACT,
            BONUS,
        )  # fmt: skip
        scale = factor
        if scale_ptr is not None:
            scale *= tl.load(scale_ptr)
        of_own, of_entropy, of_kl, of_mean = of_own * scale, of_entropy * scale, of_kl * scale, of_mean * scale
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            if V > BLOCK_V:
                z = _logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
                centred = z - peak[:, None]
                if EXACT or of_kl_ptr is not None:
                    y = _logits(y_ptr, c_ptr, place, column, y_m, y_v, factor, V, BLOCK_V)
                    other_centred = y - other_peak[:, None]
            # the exponentials once more: kept, they would take half of all registers
            slope = exp(centred - log[:, None])
            inner = tl.zeros((BLOCK_M, BLOCK_V), tl.float32) - (of_own + of_mean * (possible / V))[:, None]
            if BONUS or of_entropy_ptr is not None:
                inner -= of_entropy[:, None] * (centred - (log - entropy)[:, None])
            if EXACT or of_kl_ptr is not None:
                inner += of_kl[:, None] * (centred - other_centred - (log - other_log + kl)[:, None])
            slope *= inner
            if of_mean_ptr is not None:
                slope += tl.where(centred > IMPOSSIBLE, (of_mean / V)[:, None], 0.0)
            slope += tl.where(column[None, :] == token[:, None], of_own[:, None], 0.0)
            slope = tl.where(live[:, None], slope, 0.0)
            at = slope_ptr + place[:, None] * SLOPE_M + column[None, :]
            tl.debug_barrier()  # logits that lie there have been read
            if V % BLOCK_V == 0:
                tl.store(at, slope, valid[:, None])
            else:
                tl.store(at, slope, valid[:, None] & (column < V)[None, :])
        if state_ptr is not None:
            _copy_states(h_ptr, state_ptr, row, place, valid, live, h_m, h_e, E, STRIDE, BLOCK_M, BLOCK_E)


@triton.jit
def _log1p_exp(z):
    """log(1 + exp(-|z|)) = 2 artanh(t), by its series: exact where the exponential is small, too."""
    e = tl.exp(-tl.abs(z))
    t = e / (2.0 + e)  # at most 1 / 3
    square = t * t
    series = 1.0 / 13 + square * (1.0 / 15)
    for i in tl.static_range(6):
        series = 1.0 / (11 - 2 * i) + square * series
    return 2.0 * t * series


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _bit_logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Finite, those of certain bits too: 0 times them is 0."""
    z = _logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
    return tl.where(z > -IMPOSSIBLE, -IMPOSSIBLE, z)


@kernel(do_not_specialize=["first", "count"])  # a lone row is summed as others are
def token_log_probs_fwd_bits_kernel(
    z_ptr, b_ptr, y_ptr, c_ptr, bit_ptr, own_ptr, entropy_ptr, kl_ptr, mean_ptr,
    of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr, reference_ptr,
    slope_ptr, scale_ptr, h_ptr, state_ptr, like_ptr,
    z_m, z_v, y_m, y_v, h_m, h_e, bit_m, bit_v, first, count, L, factor, low, high, kl_weight, entropy_weight,
    V: tl.constexpr, E: tl.constexpr, STRIDE: tl.constexpr, SLOPE_M: tl.constexpr, ESTIMATOR: tl.constexpr,
    EXACT: tl.constexpr, BONUS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The same of rows of bits; the formulas are those of impl_torch.py."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = place < count
    place = tl.minimum(place, count - 1).to(tl.int64)
    row = first + place
    zero = tl.zeros((BLOCK_M,), tl.float32)
    own, entropy, kl, mean = zero, zero, zero, zero
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        seen = (column < V)[None, :]
        z = _bit_logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
        bit = tl.load(bit_ptr + row[:, None] * bit_m + column.to(tl.int64)[None, :] * bit_v, seen, 0) != 0
        likely = -_log1p_exp(z)  # log-probability of the likelier value
        size = tl.abs(z)  # of the less likely one that much less
        less = tl.minimum(tl.where(bit, z, -z), 0.0)
        own += tl.sum(tl.where(seen, likely + tl.where(less <= IMPOSSIBLE, float("-inf"), less), 0.0), 1)
        entropy += tl.sum(tl.where(seen, size * _sigmoid(-size) - likely, 0.0), 1)
        mean += tl.sum(tl.where(seen, likely - 0.5 * size, 0.0), 1)
        if y_ptr is not None:
            y = _bit_logits(y_ptr, c_ptr, place, column, y_m, y_v, factor, V, BLOCK_V)
            other, turned = -_log1p_exp(y), tl.where(z < 0, -y, y)  # above 0 where both prefer the same value
            gap = _sigmoid(size) * (likely - (other + tl.minimum(turned, 0.0)))
            gap += _sigmoid(-size) * ((likely - size) - (other - tl.maximum(turned, 0.0)))
            kl += tl.sum(tl.where(seen, gap, 0.0), 1)
    if own_ptr is not None:
        tl.store(own_ptr + row, own, valid)
        tl.store(entropy_ptr + row, entropy, valid)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, valid)
        if y_ptr is not None:
            tl.store(kl_ptr + row, kl, valid)
    if slope_ptr is None:
        _lay_out(like_ptr, place, tl.zeros((BLOCK_M, BLOCK_V), tl.float32) + own[:, None], count < 0, V, BLOCK_V)
    else:
        given = _given(
            row, of_own_ptr, of_entropy_ptr, of_kl_ptr, of_mean_ptr, share_ptr, advantage_ptr, old_ptr, reference_ptr, L
        )
        of_own, of_entropy, of_kl, of_mean, live = _coefficients(
            own, given, share_ptr, old_ptr, reference_ptr, low, high, kl_weight, entropy_weight, ESTIMATOR, EXACT, BONUS
        )
        scale = factor
        if scale_ptr is not None:
            scale *= tl.load(scale_ptr)
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            seen = (column < V)[None, :]
            z = _bit_logits(z_ptr, b_ptr, place, column, z_m, z_v, factor, V, BLOCK_V)
            one, none = _sigmoid(z), _sigmoid(-z)
            bit = tl.load(bit_ptr + row[:, None] * bit_m + column.to(tl.int64)[None, :] * bit_v, seen, 0) != 0
            slope = of_own[:, None] * tl.where(bit, none, -one)
            if BONUS or of_entropy_ptr is not None:
                slope -= of_entropy[:, None] * (z * (one * none))
            if EXACT or of_kl_ptr is not None:
                y = _bit_logits(y_ptr, c_ptr, place, column, y_m, y_v, factor, V, BLOCK_V)
                slope += of_kl[:, None] * ((z - y) * (one * none))
            if of_mean_ptr is not None:
                slope += of_mean[:, None] * tl.where(tl.abs(z) < -IMPOSSIBLE, 0.5 * (none - one), 0.0)
            slope = tl.where(live[:, None], slope * scale, 0.0)
            tl.debug_barrier()  # logits that lie there have been read
            tl.store(slope_ptr + place[:, None] * SLOPE_M + column[None, :], slope, valid[:, None] & seen)
        if state_ptr is not None:
            _copy_states(h_ptr, state_ptr, row, place, valid, live, h_m, h_e, E, STRIDE, BLOCK_M, BLOCK_E)


@kernel
def token_log_probs_bwd_multiply_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + at, tl.load(x_ptr + at, at < count, 0.0).to(tl.float32) * factor, at < count)


def multiply(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor (1), rounded once. Where the factor is 1, as that of a loss itself, x is not even read."""
    if x.numel():
        grid = (cdiv(x.numel(), 4096),)
        token_log_probs_bwd_multiply_kernel[grid](x, factor, x.numel(), BLOCK=4096, num_warps=8)


def score(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """See `losses.TwoPasses`."""
    results = _room(scoring)
    other = None if scoring.reference is None else _Head(scoring.reference)
    _Pass(_Head(scoring.head), other, scoring.tokens, scoring.temperature, results).run()
    return results


def gradients(scoring: Scoring, grads: Grads, needs: Any, unrounded: bool = False) -> dict[str, torch.Tensor]:
    """See `losses.TwoPasses`; the logits of some rows are computed anew."""
    given = [None if g is None or not g.numel() else g.flatten().float().contiguous() for g in grads[:4]]
    head = _Head(scoring.head)
    other = None if given[2] is None or scoring.reference is None else _Head(scoring.reference)
    found = _Gradients(head, needs, unrounded)
    _Pass(head, other, scoring.tokens, scoring.temperature, None, found).run(given)
    return found.found()


_FUNCTIONS = TwoPasses(score, gradients)
forward, backward = _FUNCTIONS.forward, _FUNCTIONS.backward


def policy_loss(call: PolicyLossCall) -> tuple[torch.Tensor, ...]:
    """See `losses.TwoPasses`. The loss of a ratio of many tokens is not known before all their log-probabilities are,
    and the scale that float16 slopes need is not known before the slopes: both take a second pass over the logits."""
    head, tokens = _Head(call.head), call.tokens
    if any(call.needs) and (call.options.ratio_level != "token" or head.slope_dtype == torch.float16):

        def terms(log_probs: torch.Tensor, entropy: torch.Tensor, kl: torch.Tensor | None, call: PolicyLossCall) -> Any:
            policy = Policy(call)
            slope = torch.empty_like(policy.share)
            return (*policy.measure(log_probs, entropy, kl, slope), slope, policy.share)

        return _FUNCTIONS.policy_loss(call, terms)
    results = _room(Scoring(call.head, tokens, call.reference))
    reference = None if call.reference is None else _Head(call.reference)
    gradients = _Gradients(head, Wanted(*call.needs), True) if any(call.needs) else None
    logits = _Pass(head, reference, tokens, call.temperature, results, gradients)
    policy = Policy(call)
    logits.run(policy=policy)
    measured = policy.measure(results[0], results[1], None if reference is None else results[2], None)
    found = three({} if gradients is None else gradients.found(), Wanted(*call.needs), results[0])
    return (*measured, results[0], *found)


def cross_entropy(call: CrossEntropyCall) -> tuple[torch.Tensor, ...]:
    """The loss (), each token's and its entropy (B, L), and three gradients, empty where not wanted."""
    results = _room(Scoring(call.head, call.tokens, mean=call.label_smoothing > 0))
    head, share = _Head(call.head), losses.shares(call.weights, call.tokens, torch.float32)
    given = [None if g is None else g.flatten() for g in losses.of_scores(share, call.label_smoothing)]
    gradients = _Gradients(head, Wanted(*call.needs), True) if any(call.needs) else None
    _Pass(head, None, call.tokens, 1.0, results, gradients).run(given)
    found = three({} if gradients is None else gradients.found(), Wanted(*call.needs), results[0])
    return (*losses.smoothed(results, share, call.label_smoothing), *found)


def _room(scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """What `score` returns, yet to be filled."""
    shape, none = scoring.tokens.shape[:2], (0,)
    kl = none if scoring.reference is None else shape
    shapes = (shape, shape, kl, shape if scoring.mean else none)
    return tuple(torch.empty(each, dtype=torch.float32, device=scoring.tokens.device) for each in shapes)


class _Head:
    """Logits (., V) of some rows, without the bias and before the temperature.

    Attributes:
        rows: (M, E) hidden states, or the logits (M, V) where there is no weight.
        step: rows of a product; all there are where there is none.
    """

    def __init__(self, head: Head) -> None:
        hidden, weight, bias = head
        self.shape, self.rows = hidden.shape, hidden.detach().flatten(0, 1)
        self.weight = None if weight is None else weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach().contiguous()
        self.size = hidden.shape[-1] if weight is None else len(weight)
        self.step = len(self.rows) if weight is None else product_rows(self.size)
        self.slope_dtype = torch.float32 if self.weight is None else self.weight.dtype
        self._held: torch.Tensor | None = None

    def hold(self, rows: int) -> torch.Tensor:
        """Memory for the logits of so many rows (rows, V)."""
        self._held = torch.empty(rows, self.size, dtype=torch.float32, device=self.rows.device)
        return self._held

    def drop(self) -> None:
        """Give the memory of the logits back."""
        self._held = None

    def logits(self, first: int, stop: int, offset: int) -> torch.Tensor:
        """Logits of the rows from `first` up to `stop`, at most `step`, in the memory of the row `offset` and of those
        after it: of `step` rows, whatever stands in those that are not asked for."""
        if self.weight is None:
            return self.rows[first:stop]
        held = self.hold(self.step) if self._held is None else self._held
        states = self.rows[first : first + self.step].to(self.weight.dtype).contiguous()
        if len(states) < self.step:
            states = F.pad(states, (0, 0, 0, self.step - len(states)))
        product = held if len(held) == self.step else held[offset : offset + self.step]
        _wide_product(states, self.weight.T, out=product)
        return product


def product_rows(size: int) -> int:
    """How many rows of logits one product gives: of the vocabulary alone."""
    return min(max(PRODUCT // size // 128 * 128, ROWS[0]), ROWS[1])


def _parts(first: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """From `first` up to `stop`, so many at a time. The first part is the smaller one: its product may go beyond it."""
    while first < stop:
        end = stop - (stop - first - 1) // size * size
        yield first, end
        first = end


class _Gradients:
    """Gradients of a head's tensors from the slopes of its logits, some rows at a time.

    The weight's is summed in float32, and the bias's with it as one more column. Slopes are rounded to the weight's
    dtype; those of a mean over many tokens would be below the least float16, so there they are scaled by a power of
    two, which the float32 results of the products are divided by.

    Attributes:
        step: rows at a time.
        slopes: (step, V), to be filled. A row lies where its logits do, in the first bytes of theirs.
        states: (step, STRIDE), to be filled with the hidden states; None where there is no weight that needs them.
    """

    def __init__(self, head: _Head, needs: Any, unrounded: bool) -> None:
        self.head, self.unrounded, given = head, unrounded, head.weight is not None
        self.needs = Wanted(needs.head_hidden, needs.head_weight and given, needs.head_bias and head.bias is not None)
        count, width = head.rows.shape
        like: dict[str, Any] = {"device": head.rows.device}
        self.of_hidden = None
        if self.needs.head_hidden:
            dtype = losses.unrounded(head.rows.dtype) if unrounded else head.rows.dtype
            self.of_hidden = torch.empty(count, width, dtype=dtype, **like)
        self.step, self.width = count, width
        self.states = self.of_head = None
        if head.weight is None:
            self.slopes = self.of_hidden
            return
        step = min(max(SLOPES // head.size, SLOPE_ROWS[0]), SLOPE_ROWS[1], max(count // SHARE, 1))
        self.step = cdiv(step, head.step) * head.step
        self.stride = width + 8 if self.needs.head_bias else width  # keeps rows at multiples of 16 bytes
        rows = min(count, self.step)
        held = head.hold(cdiv(rows, head.step) * head.step)
        self.slopes = held.view(head.slope_dtype)[:rows, : head.size]
        if self.needs.head_weight or self.needs.head_bias:
            self.states = torch.empty(rows, self.stride, dtype=head.slope_dtype, **like)

    def add(self, first: int, stop: int, scale: torch.Tensor | None) -> None:
        """Take in the slopes and states of the rows from `first` up to `stop`."""
        if self.head.weight is None or self.slopes is None:
            return
        slopes = self.slopes[: stop - first]
        if self.of_hidden is not None:
            rows = self.of_hidden[first:stop]
            if scale is None and rows.dtype == slopes.dtype:
                torch.mm(slopes, self.head.weight, out=rows)
            else:
                product = _wide_product(slopes, self.head.weight)
                rows.copy_(product if scale is None else product.div_(scale))
        if self.states is not None:
            states = self.states[: stop - first]
            if scale is None and self.of_head is not None:
                _add_product(self.of_head, slopes.T, states)
                return
            product = _wide_product(slopes.T, states)
            if scale is not None:
                product.div_(scale)
            self.of_head = product if self.of_head is None else self.of_head.add_(product)

    def found(self) -> dict[str, torch.Tensor]:
        """The gradients that are needed."""
        if self.states is not None and self.of_head is None:  # no rows
            self.of_head = self.states.new_zeros(self.head.size, self.stride, dtype=torch.float32)
        self.slopes = self.states = None
        self.head.drop()
        found = {}
        if self.of_hidden is not None:
            found["head_hidden"] = self.of_hidden.view(self.head.shape)
        if self.of_head is not None and self.head.weight is not None:
            dtype = torch.float32 if self.unrounded else self.head.weight.dtype
            if self.needs.head_weight:
                found["head_weight"] = self.of_head[:, : self.width].to(dtype).contiguous()
            if self.needs.head_bias:
                found["head_bias"] = self.of_head[:, self.width].to(dtype, copy=True)
        return found


class _Pass:
    """One pass over the logits: results, if there is room for them, and gradients, if there are any to be made, of
    what is given a token or of a policy loss. The first product is under way before these are known."""

    def __init__(
        self,
        head: _Head,
        other: _Head | None,
        tokens: torch.Tensor,
        temperature: float,
        results: Sequence[torch.Tensor] | None,
        gradients: _Gradients | None = None,
    ) -> None:
        self.head, self.other, self.gradients = head, other, gradients
        count = len(head.rows)
        outer = max(count if gradients is None else gradients.step, 1)
        step = max(head.step if other is None else min(head.step, other.step), 1)
        self.parts = [(part, list(_parts(*part, step))) for part in _parts(0, count, outer)]
        self.first = self._products(*self.parts[0][1][0], 0) if count else None
        self.factor = 1.0 / temperature
        self.bits = tokens.ndim == 3
        self.tokens = tokens.flatten(0, 1) if self.bits else tokens.flatten().contiguous()
        width = head.rows.shape[1]
        stride = width if gradients is None or gradients.states is None else gradients.stride
        self.options = tile_options(head.size, width, stride, head.rows.device)
        self.options |= {"SLOPE_M": 0, "ESTIMATOR": "", "EXACT": False, "BONUS": False}
        if gradients is not None and gradients.slopes is not None:
            self.options["SLOPE_M"] = gradients.slopes.stride(0)
        own, entropy, kl, mean = (None,) * 4 if results is None else results
        # an empty result is one that nobody asked for
        kl, mean = (None if t is None or not t.numel() else t for t in (kl, mean))
        self.results = (own, entropy, kl, mean)

    def run(self, given: Sequence[torch.Tensor | None] = (None,) * 4, policy: Policy | None = None) -> None:
        """Results and gradients of what is `given` a token, or of a policy loss."""
        of_loss: tuple[Any, ...] = (None,) * 4
        self.settings: tuple[Any, ...] = (1, self.factor, 0.0, 0.0, 0.0, 0.0)
        if policy is not None:
            self.options["ESTIMATOR"] = policy.estimator
            self.options["EXACT"] = self.other is not None and policy.kl_weight != 0
            self.options["BONUS"] = policy.entropy_weight != 0
            of_loss = (policy.share, policy.advantages, policy.old, policy.reference)
            bounds = (policy.low, policy.high, policy.kl_weight, policy.entropy_weight)
            self.settings = (policy.length, self.factor, *bounds)
        self.of_tokens = (*given, *of_loss)
        for (first, stop), products in self.parts:
            scale = None
            if self.gradients is not None and self.head.slope_dtype == torch.float16:
                scale = _scale(given, first, stop, self.factor)
            for begin, end in products:
                self._launch(begin, end, begin - first, scale)
            if self.gradients is not None:
                self.gradients.add(first, stop, scale)

    def _products(self, first: int, stop: int, offset: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the rows from `first` up to `stop`, those that training holds from the row `offset` on; the
        reference's."""
        other = None if self.other is None else self.other.logits(first, stop, 0)
        return self.head.logits(first, stop, offset), other

    def _launch(self, first: int, stop: int, offset: int, scale: torch.Tensor | None) -> None:
        """Rows from `first` up to `stop`, whose slopes begin at the row `offset` of those held."""
        head, other, gradients = self.head, self.other, self.gradients
        offset = 0 if gradients is None else offset
        z, y = self._products(first, stop, offset) if self.first is None else self.first
        self.first = None
        slopes = states = hidden = None
        if gradients is not None and gradients.slopes is not None:
            slopes = gradients.slopes[offset:]
        if gradients is not None and gradients.states is not None:
            states, hidden = gradients.states[offset:], head.rows
        like = head.rows if head.weight is None else head.weight
        tensors = (
            *(z, head.bias, y, None if other is None else other.bias, self.tokens, *self.results),
            *(*self.of_tokens, slopes, scale, hidden, states, like),
            *(*z.stride(), *((0, 0) if y is None else y.stride()), *head.rows.stride()),
        )
        grid = (-(-(stop - first) // self.options["BLOCK_M"]),)
        if self.bits:
            token_log_probs_fwd_bits_kernel[grid](
                *tensors, *self.tokens.stride(), first, stop - first, *self.settings, **self.options
            )
        else:
            token_log_probs_fwd_kernel[grid](*tensors, first, stop - first, *self.settings, **self.options)


def tile_options(size: int, width: int, stride: int, device: torch.device) -> dict[str, Any]:
    """The kernels' constants for a vocabulary and hidden sizes. Multiplications and additions are not fused: whether
    they were could differ between scoring and training."""
    tile = LOGITS.choose(card(device), size=size)
    elements = tile.pop("ELEMENTS")
    block = min(power_of_2(max(size, 16)), elements)
    rows = min(elements // block, 64)
    return {
        "V": size,
        "E": width,
        "STRIDE": stride,
        "BLOCK_M": rows,
        "BLOCK_V": block,
        "BLOCK_E": min(power_of_2(max(stride, 16)), max(elements // rows, 16)),
        "num_stages": 1,
        "enable_fp_fusion": False,
        **tile,
    }


def _scale(of_rows: Sequence[torch.Tensor | None], first: int, stop: int, factor: float) -> torch.Tensor | None:
    """The power of two (1) that brings the largest finite gradient of these rows to LARGEST / 2 or more, below
    LARGEST. It stays on the device."""
    given = [g[first:stop] for g in of_rows if g is not None]
    if not given:
        return None
    largest = torch.stack(given).mul_(factor).abs_().nan_to_num_(0.0, 0.0, 0.0).amax().view(1)
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # its exponent alone
    return LARGEST / 2 / power.clamp_min(2.0**-100)


def _wide_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # interpreted
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type != "cpu" and _adds_wide(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _wide_product(a, b)


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of 16 bits to a sum in float32; older ones want the sum in 16 bits too."""
    factor, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
