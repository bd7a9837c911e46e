"""Log-probability and entropy of tokens from hidden states and the head, without the logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation
from fastvar.ranges import TEMPERATURE


class Head(NamedTuple):
    """Hidden states (B, L, E), weight (V, E) and bias (V,); without a weight the logits themselves (B, L, V). Of d bits
    V is d."""

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


AnyHead = Head | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | torch.Tensor


class TokenLogProbs(NamedTuple):
    """(B, L) log-probabilities, entropies in nats and, with a reference head, KL(policy || reference), else None."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None = None


class LogProbsCall(NamedTuple):
    """A call of `token_log_probs`: tokens (B, L), or bits (B, L, d)."""

    head: Head
    tokens: torch.Tensor
    reference: Head | None
    temperature: float


def _fake(call: LogProbsCall) -> tuple[torch.Tensor, ...]:
    hidden, shape = call.head.hidden, call.tokens.shape[:2]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (shape, shape, (0,) if call.reference is None else shape)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def fake_gradients(head: Head, needs: Sequence[bool]) -> list[torch.Tensor]:
    """What a loss's op makes of gradients of hidden, weight and bias; empty where not needed."""
    dtype, wide = head.hidden.dtype, torch.promote_types(head.hidden.dtype, torch.float32)
    dtypes = (wide if dtype == torch.float16 else dtype, wide, wide)
    return [
        head.hidden.new_empty(leaf.shape if need and leaf is not None else 0, dtype=each if need else wide)
        for leaf, each, need in zip(head, dtypes, needs, strict=True)
    ]


def implementations(function: str = "") -> list[Implementation]:
    """The implementations of this operator, or the functions of that name beside them, which are a loss."""
    folder = "fastvar.kernels.token_log_probs"
    return [
        triton_implementation("token_log_probs", function=function, verified=("H200 (before its last change)",)),
        Implementation("torch", f"{folder}.impl_torch:{function}", verified=("CPU",)),
        Implementation("reference", f"{folder}.reference:{function}", verified=("CPU",)),
    ]


_LOG_PROBS = Operator(
    "token_log_probs",
    LogProbsCall,
    results=3,  # log_probs, entropy, kl
    fake=_fake,
    implementations=implementations(),
    choices=[Choice("triton", {"sm90": "044712c"})],
)


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    reference_head: AnyHead | None = None,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-probability of each token and entropy of its distribution, softmax((hidden weight^T + bias) / temperature).

    The logits exist for a few rows at a time only, in the forward and in the backward pass, which computes them anew.

    Args:
        hidden: (B, L, E), the states that the head reads. Without a weight they are the logits themselves: (B, L, V),
            or (B, L, d) for bits.
        weight: (V, E), the head; (d, E) for bits, where it gives difference logits (of 1 minus of 0). Or None. In
            hidden's dtype, or float32 beside hidden states in 16 bits: then the product is one of float32.
        bias: (V,), (d,) for bits, or None.
        tokens: (B, L) int64 or int32 in 0..V-1; or (B, L, d) bits, bool or integers 0 and 1, whose log-probabilities
            and entropies are summed over d.
        temperature: 1e-12 to 1e12; the one that the tokens were drawn with.
        reference_head: (hidden, weight, bias) of the reference policy, or its logits, for the exact KL over the
            vocabulary; its width may differ, its vocabulary may not. It gets no gradient.
        backend: see `fastvar.support()`.

    Returns:
        log_probs, entropy and kl, (B, L) each; kl is None without a reference. Differentiable in hidden, weight and
        bias. Products of the inputs, sums and statistics in float32 (float64 for float64); under autocast the inputs of
        the product are first rounded to its dtype, as a linear layer would. A row's result does not depend on the
        other rows, nor on how many they are, wherever a matrix product of 16 rows or more has that property. The
        weight's gradient is summed in a fixed order in float32 and rounded once. On a GPU products of float32 follow
        torch.set_float32_matmul_precision, as a linear layer's do.

        A row whose incoming gradients are all 0 is left out of the gradients, whatever stands in it, NaN too. A logit
        of minus infinity has probability 0 and, unless it is the token's own, no gradient; the log-probability of such
        a token is minus infinity, as is that of a bit against an infinite logit; in KL and smoothed losses it counts as
        -1e30. Finite logits below -1e30 are taken for minus infinity too, by some backends. A row of nothing but
        minus infinity, one with plus infinity and one with NaN are NaN; an infinite logit of a bit makes it certain.

    Raises:
        ValueError: shapes or dtypes that do not fit, no logits at all, temperature not above 0; on a CPU also tokens
            out of range (on other devices that would need a synchronisation, and the result is undefined).
    """
    op = "token_log_probs"
    head = checked(op, Head(hidden, weight, bias), tokens, temperature)
    other = checked_reference(op, head, reference_head)
    log_probs, entropy, kl = _LOG_PROBS(LogProbsCall(head, tokens, other, temperature), backend)
    return TokenLogProbs(log_probs, entropy, None if other is None else kl)


def as_head(op: str, argument: str, head: AnyHead) -> Head:
    """What was given for a head: its record, its three tensors or logits."""
    if isinstance(head, torch.Tensor):
        return Head(head)
    if not isinstance(head, tuple):
        _checks.fail(op, argument, "(hidden, weight, bias) or logits", _checks.kind(head))
    if len(head) != 3:
        _checks.fail(op, argument, "(hidden, weight, bias) or logits", f"{len(head)} items")
    if head[0] is None:
        _checks.fail(op, argument, "hidden states or logits first", None)
    return Head(*head)


def checked(op: str, head: Head, tokens: torch.Tensor, temperature: float = 1.0) -> Head:
    """The head, checked together with the tokens on behalf of the operator `op`, rounded as autocast asks for."""
    _checks.shape(op, "hidden", head.hidden, "B", "L", "V" if head.weight is None else "E")
    _checks.number(op, "temperature", temperature, TEMPERATURE)
    head = _checked_head(op, "", head)
    hidden, weight = head.hidden, head.weight
    size = hidden.shape[2] if weight is None else weight.shape[0]
    if size == 0:
        name, tensor = ("hidden", hidden) if weight is None else ("weight", weight)
        _checks.fail(op, name, f"{'d' if tokens.ndim == 3 else 'V'} of at least 1", tuple(tensor.shape))
    if tokens.ndim == 3:
        _checks.shape(op, "tokens", tokens, *hidden.shape[:2], size)
        if tokens.dtype != torch.bool:
            _checks.integer(op, "tokens", tokens)
    else:
        _checks.shape(op, "tokens", tokens, *hidden.shape[:2])
        _checks.integer(op, "tokens", tokens)
    if tokens.device != hidden.device:
        _checks.fail(op, "tokens", f"a tensor on {hidden.device} as hidden", tokens.device)
    return head


def checked_reference(op: str, head: Head, reference: AnyHead | None) -> Head | None:
    """The same for the head of a reference policy; of no gradient."""
    if reference is None:
        return None
    hidden = head.hidden
    size = hidden.shape[2] if head.weight is None else head.weight.shape[0]
    other = detached(as_head(op, "reference_head", reference))
    _checks.shape(op, "reference_head hidden", other.hidden, *hidden.shape[:2], size if other.weight is None else "E")
    other = _checked_head(op, "reference_head ", other, size)
    if (other.hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
        _checks.fail(op, "reference_head hidden", f"a dtype that goes with {hidden.dtype}", other.hidden.dtype)
    return other


def detached(head: Head) -> Head:
    """The same without its gradient."""
    hidden, weight, bias = head
    return Head(hidden.detach(), None if weight is None else weight.detach(), None if bias is None else bias.detach())


def _checked_head(op: str, prefix: str, head: Head, size: int | None = None) -> Head:
    """The tensors of a head, checked and, under autocast, rounded to its dtype."""
    hidden, weight, bias = head
    _checks.floating(op, f"{prefix}hidden", hidden)
    if weight is None:
        if bias is not None:
            _checks.fail(op, f"{prefix}bias", "None, as there is no weight", "a tensor")
        return head
    _checks.shape(op, f"{prefix}weight", weight, "V" if size is None else size, hidden.shape[2])
    if bias is not None:
        _checks.shape(op, f"{prefix}bias", bias, weight.shape[0])
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    if half and weight.dtype == torch.float32 and weight.device == hidden.device:
        _checks.same_dtype_and_device(op, f"{prefix}weight", weight, **{f"{prefix}bias": bias})
    else:
        named = {f"{prefix}weight": weight, f"{prefix}bias": bias}
        _checks.same_dtype_and_device(op, f"{prefix}hidden", hidden, **named)
    return Head(hidden, weight, bias)
