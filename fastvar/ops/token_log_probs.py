"""Log-probability and entropy of tokens from hidden states and the head, without the logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._dispatch import Implementation
from fastvar.ops._positional import PositionalOperator
from fastvar.ops._triton import triton_implementation
from fastvar.ranges import TEMPERATURE

Head = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class TokenLogProbs(NamedTuple):
    """(B, L) log-probabilities, entropies in nats and, with a reference head, KL(policy || reference), else None."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None = None


def _fake(
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
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shape = tokens.shape[:2]
    none = (0,)
    sums = 0 if tokens.ndim == 3 else 2 if reference_hidden is None else 4
    shapes = (shape, shape, none if reference_hidden is None else shape, shape if mean else none, (sums, *shape))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, needs: Sequence[bool]
) -> list[torch.Tensor]:
    """What a loss's op makes of gradients of hidden, weight and bias; empty where not needed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dtypes = (wide if hidden.dtype == torch.float16 else hidden.dtype, wide, wide)
    return [
        hidden.new_empty(leaf.shape, dtype=dtype) if need and leaf is not None else hidden.new_empty(0, dtype=wide)
        for leaf, dtype, need in zip((hidden, weight, bias), dtypes, needs, strict=True)
    ]


def implementations() -> list[Implementation]:
    """The modules that hold this operator and the losses made of it."""
    return [
        triton_implementation("token_log_probs"),
        Implementation("cpu", "fastvar.kernels.token_log_probs.impl_cpu", devices=("cpu",), verified=("CPU",)),
        Implementation("reference", "fastvar.kernels.token_log_probs.reference", verified=("CPU",)),
    ]


_LOG_PROBS = PositionalOperator(
    "token_log_probs",
    "Tensor hidden, Tensor? weight, Tensor? bias, Tensor tokens, Tensor? reference_hidden, Tensor? reference_weight, "
    "Tensor? reference_bias, float temperature, bool mean",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",  # log_probs, entropy, kl, mean, sums for the backward pass
    fake=_fake,
    implementations=implementations(),
    keeps_results=None,
)


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    reference_head: Head | None = None,
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
        reference_head: (hidden, weight, bias) of the reference policy for the exact KL over the vocabulary; its width
            may differ, its vocabulary may not. It gets no gradient.
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
    hidden, weight, bias = checked(op, hidden, weight, bias, tokens, temperature)
    other = checked_reference(op, hidden, weight, reference_head)
    found = _LOG_PROBS(backend, hidden, weight, bias, tokens, *other, temperature, False)
    return TokenLogProbs(found[0], found[1], None if reference_head is None else found[2])


def checked(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float = 1.0,
) -> Head:
    """The head, checked together with the tokens on behalf of the operator `op`, rounded as autocast asks for."""
    _checks.shape(op, "hidden", hidden, "B", "L", "V" if weight is None else "E")
    _checks.number(op, "temperature", temperature, TEMPERATURE)
    hidden, weight, bias = _checked_head(op, "", hidden, weight, bias)
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
    return hidden, weight, bias


def checked_reference(
    op: str, hidden: torch.Tensor, weight: torch.Tensor | None, head: Head | None
) -> Head | tuple[None, None, None]:
    """The same for the head of a reference policy; of no gradient."""
    if head is None:
        return None, None, None
    if len(head) != 3:
        _checks.fail(op, "reference_head", "(hidden, weight, bias)", f"{len(head)} items")
    if head[0] is None:
        _checks.fail(op, "reference_head", "hidden states or logits first", None)
    size = hidden.shape[2] if weight is None else weight.shape[0]
    states = head[0].detach()
    matrix, offset = (None if t is None else t.detach() for t in head[1:])
    _checks.shape(op, "reference_head hidden", states, *hidden.shape[:2], size if matrix is None else "E")
    other = _checked_head(op, "reference_head ", states, matrix, offset, size)
    if (other[0].dtype == torch.float64) != (hidden.dtype == torch.float64):
        _checks.fail(op, "reference_head hidden", f"a dtype that goes with {hidden.dtype}", other[0].dtype)
    return other


def _checked_head(
    op: str,
    prefix: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    size: int | None = None,
) -> Head:
    """The tensors of a head, checked and, under autocast, rounded to its dtype."""
    _checks.floating(op, f"{prefix}hidden", hidden)
    if weight is None:
        if bias is not None:
            _checks.fail(op, f"{prefix}bias", "None, as there is no weight", "a tensor")
        return hidden, None, None
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
    return hidden, weight, bias
