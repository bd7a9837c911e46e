"""Drawing the tokens (or bits) of a scale from logits: guidance, temperature, top-k, top-p, counter-based draws."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._record import Scalar
from fastvar.ops._triton import triton_implementation
from fastvar.ranges import GUIDANCE, TEMPERATURE


class SampleCall(NamedTuple):
    """A call of `sample_tokens` or `sample_bits`: logits and unconditional (B, n, V) or (B, n, d), seeds (B,)."""

    logits: torch.Tensor
    unconditional: torch.Tensor | None
    seeds: torch.Tensor
    guidance: Scalar
    temperature: Scalar
    top_k: int
    top_p: float
    position: int
    log_probs: bool


class SampledTokens(NamedTuple):
    """Tokens (B, n) int64; with `log_probs=True` their log-probabilities (B, n) in float32, else None."""

    tokens: torch.Tensor
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None


class SampledBits(NamedTuple):
    """Bits (B, n, d) bool; with `log_probs=True` log-probabilities (B, n) in float32 summed over d bits, else None."""

    bits: torch.Tensor
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None


def _fake(call: SampleCall, drawn: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shape = call.logits.shape[:2] if call.log_probs else (0,)
    dtype = torch.promote_types(call.logits.dtype, torch.float32)
    return drawn, call.logits.new_empty(shape, dtype=dtype), call.logits.new_empty(shape, dtype=dtype)


_KERNELS = "fastvar.kernels.sample_tokens"
_TOKENS = Operator(
    "sample_tokens",
    SampleCall,
    results=3,
    fake=lambda call: _fake(call, call.logits.new_empty(call.logits.shape[:2], dtype=torch.int64)),
    implementations=[
        # a row is held in registers
        triton_implementation(
            "sample_tokens", function="tokens", largest=2**15, verified=("H200 (before its last change)",)
        ),
        Implementation("torch", f"{_KERNELS}.impl_torch:tokens", devices=("cpu",), verified=("CPU",)),
        Implementation("reference", f"{_KERNELS}.reference:tokens", verified=("CPU", "H200")),
    ],
    choices=[Choice("triton", {"sm90": "044712c"})],
    differentiable=False,
)
_BITS = Operator(
    "sample_bits",
    SampleCall,
    results=3,
    fake=lambda call: _fake(call, call.logits.new_empty(call.logits.shape, dtype=torch.bool)),
    implementations=[
        triton_implementation("sample_tokens", function="bits", largest=2**15, verified=("H200",)),
        Implementation("reference", f"{_KERNELS}.reference:bits", verified=("CPU", "H200")),
    ],
    choices=[Choice("triton")],
    differentiable=False,
)


def sample_tokens(
    logits: torch.Tensor,
    *,
    unconditional: torch.Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: torch.Tensor,
    position: int = 0,
    log_probs: bool = False,
    backend: str = "auto",
) -> SampledTokens:
    """Draw one token from each row of logits, the same one in any batch.

    With t the guidance, z = ((1 + t) logits - t unconditional) / temperature. Top-k keeps every z >= the k-th largest,
    ties included. Of what it keeps top-p drops each z for which the probability of all kept logits <= z is <= 1 - p;
    equal logits stay or go together and the largest always stays. The token is the first whose cumulative probability
    in index order exceeds u, a uniform number that depends on the sample's seed and the token's position alone.

    Args:
        logits: (B, n, V), any floating dtype. Minus infinity bans a token, whatever `unconditional` says of it.
        unconditional: (B, n, V), the logits without the condition; needed where guidance is not 0.
        guidance: t as VAR defines it. Infinity's cfg * conditional + (1 - cfg) * unconditional is t = cfg - 1.
        temperature: 1e-12 to 1e12; for the largest logit take top_k=1.
        top_k: how many logits to keep; 0 (or at least V) keeps all. 1 is the argmax; logits that tie for it are all
            kept, and one of them is drawn.
        top_p: probability mass to keep; 1 (and, as upstream, 0) keeps all.
        seeds: (B,) int64, one seed a sample. Samples that are to differ need different seeds, also when they continue
            one shared beginning.
        position: index of the first token in its image, so that each scale draws numbers of its own.
        log_probs: also return log-probabilities.
        backend: see `fastvar.support()`.

    Returns:
        tokens (B, n) int64. log_probs (B, n): of the token under the model's own distribution,
        softmax(logits / temperature) without guidance and truncation, as `token_log_probs` gives it and as policy
        gradients need it. sampled_log_probs (B, n): under the distribution it was drawn from. Arithmetic and
        log-probabilities in float32 (float64 for float64 logits). Carries no gradient.

        Equal logits give equal tokens on every device and backend, unless u is within roundings of float32 of the bound
        between two tokens, or 1 - p within those of the probability that top-p compares with it.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.

    Source: VAR (arXiv 2404.02905), `sample_with_top_k_top_p_`. Its draws come from torch.multinomial, which no other
        sampler can repeat: equal seeds give other images there.
    """
    op = "sample_tokens"
    _check(op, "V", logits, unconditional, guidance, temperature, top_p, seeds, position)
    if top_k < 0:
        _checks.fail(op, "top_k", "at least 0 (0 keeps all)", top_k)
    call = SampleCall(logits, unconditional, seeds, guidance, temperature, top_k, top_p, position, log_probs)
    tokens, own, sampled = _TOKENS(call, backend)
    return SampledTokens(tokens, own if log_probs else None, sampled if log_probs else None)


def sample_bits(
    logits: torch.Tensor,
    *,
    unconditional: torch.Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 2,
    top_p: float = 1.0,
    seeds: torch.Tensor,
    position: int = 0,
    log_probs: bool = False,
    backend: str = "auto",
) -> SampledBits:
    """Draw the d bits of each token from difference logits, the same ones in any batch.

    A bit is a vocabulary of two, {0, 1}, whose logits differ by z, and `sample_tokens` has a closed form for it. With
    z = ((1 + t) logits - t unconditional) / temperature: the bit is z > 0 where |z| >= log(p / (1 - p)), else it is 1
    with probability sigmoid(z). For p <= 1/2 every bit is therefore certain, save those with z = 0, which stay fair.

    Args:
        logits: (B, n, d), the logit of 1 minus the logit of 0, any floating dtype. Infinite ones make bits certain;
            under guidance two infinite ones of a sign cancel.
        unconditional: (B, n, d), without the condition; needed where guidance is not 0.
        guidance: t as VAR defines it. Infinity's cfg is 1 + t.
        temperature: 1e-12 to 1e12; for the likelier bit take top_k=1. Infinity calls it tau.
        top_k: 1 takes the likelier bit (a fair draw where z = 0), 0 and 2 draw. Infinity's 900 is 2.
        top_p: probability mass to keep; 0 and 1 keep all.
        seeds: (B,) int64, one seed a sample.
        position: index of the first token in its image: bit j of token i has the counter (position + i) d + j.
        log_probs: also return log-probabilities.
        backend: see `fastvar.support()`.

    Returns:
        bits (B, n, d) bool; log_probs and sampled_log_probs (B, n), summed over a token's bits, as in `sample_tokens`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.

    Source: Infinity (arXiv 2412.04431), whose sampler runs over d rows of two logits.
    """
    op = "sample_bits"
    _check(op, "d", logits, unconditional, guidance, temperature, top_p, seeds, position)
    if top_k not in (0, 1, 2):
        _checks.fail(op, "top_k", "0, 1 or 2", top_k)
    call = SampleCall(logits, unconditional, seeds, guidance, temperature, top_k, top_p, position, log_probs)
    bits, own, sampled = _BITS(call, backend)
    return SampledBits(bits, own if log_probs else None, sampled if log_probs else None)


def _check(
    op: str,
    size_name: str,
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance: float,
    temperature: float,
    top_p: float,
    seeds: torch.Tensor,
    position: int,
) -> None:
    _checks.shape(op, "logits", logits, "B", "n", size_name)
    _checks.floating(op, "logits", logits)
    if logits.shape[2] == 0:
        _checks.fail(op, "logits", f"{size_name} of at least 1", tuple(logits.shape))
    if unconditional is not None:
        _checks.shape(op, "unconditional", unconditional, *logits.shape)
        _checks.same_dtype_and_device(op, "logits", logits, unconditional=unconditional)
    _checks.number(op, "guidance", guidance, GUIDANCE)
    if unconditional is None and guidance != 0:
        _checks.fail(op, "unconditional", f"a tensor, as guidance is {guidance}", None)
    if temperature == 0:
        _checks.fail(op, "temperature", f"{TEMPERATURE} (for the likeliest one take top_k=1)", temperature)
    _checks.number(op, "temperature", temperature, TEMPERATURE)
    if not 0 <= top_p <= 1:
        _checks.fail(op, "top_p", "a probability from 0 to 1", top_p)
    _checks.shape(op, "seeds", seeds, logits.shape[0])
    if seeds.dtype != torch.int64 or seeds.device != logits.device:
        _checks.fail(op, "seeds", f"torch.int64 on {logits.device} as logits", f"{seeds.dtype} on {seeds.device}")
    if position < 0:
        _checks.fail(op, "position", "at least 0", position)
