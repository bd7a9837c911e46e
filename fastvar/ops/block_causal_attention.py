"""Scale-wise block-causal attention over an optional prefix that a group of samples shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._packages import installed, package_implementation
from fastvar.ops._triton import triton_implementation
from fastvar.schedule import ScaleSchedule


class PrefixKV(NamedTuple):
    """Keys and values that a group of batch rows shares: batch row b reads row b // G.

    Attributes:
        k: (B/G, P, H, D), any strides.
        v: (B/G, P, H, D), any strides.
        lengths: (B/G,) int32 or int64, how many of the P tokens are valid, counted from the left; None for all.
    """

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None = None


def check_shared(op: str, argument: str, shared: PrefixKV, q: torch.Tensor) -> None:
    """Check keys and values that rows share against queries q (B, n, H, D)."""
    _checks.shape(op, f"{argument}.k", shared.k, "rows", "P", q.shape[2], q.shape[3])
    _checks.shape(op, f"{argument}.v", shared.v, *shared.k.shape)
    _checks.same_dtype_and_device(op, "q", q, **{f"{argument}.k": shared.k, f"{argument}.v": shared.v})
    _checks.groups(op, f"{argument}.k", q.shape[0], shared.k.shape[0])
    if shared.lengths is not None:
        _checks.shape(op, f"{argument}.lengths", shared.lengths, shared.k.shape[0])
        _checks.integer(op, f"{argument}.lengths", shared.lengths)
        _checks.same_device(op, "q", q, **{f"{argument}.lengths": shared.lengths})


def _fake(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = (batch, heads, length) if rest[-1] else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(lse, dtype=dtype, device=q.device)


_HALF = (torch.float16, torch.bfloat16)
_OPERATOR = Operator(
    "block_causal_attention",
    "Tensor q, Tensor k, Tensor v, int[] grids, Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_lengths, "
    "float softmax_scale, bool block_diagonal, bool with_lse",
    "(Tensor, Tensor)",
    fake=_fake,
    implementations=[
        triton_implementation("block_causal_attention"),
        Implementation("cpu", "fastvar.kernels.block_causal_attention.impl_cpu", devices=("cpu",), verified=("CPU",)),
        package_implementation(
            "sdpa",
            "block_causal_attention",
            (),
            (torch.float32, *_HALF),
            devices=("cuda", "cpu"),
            head_dims=256,
            verified=("CPU",),
        ),
        package_implementation("flex", "block_causal_attention", (), (torch.float32, *_HALF)),
        package_implementation(
            "flash_attn",
            "block_causal_attention",
            ("flash-attn-4", "flash-attn"),
            _HALF,
            head_dims=256,
            ragged=installed("flash-attn-4"),
        ),
        package_implementation(
            "xformers", "block_causal_attention", ("xformers",), (torch.float32, *_HALF), ragged=False
        ),
        Implementation("reference", "fastvar.kernels.block_causal_attention.reference", verified=("CPU",)),
    ],
    keeps_results=None,
)


def block_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    prefix: PrefixKV | None = None,
    softmax_scale: float | None = None,
    block_diagonal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention in which a token of scale k sees the prefix and every token of scales <= k.

    Args:
        q, k, v: (B, L, H, D) with L = schedule.num_tokens, one floating dtype, any strides.
        schedule: the scales of the L tokens.
        prefix: tokens before the image that every sample of a group shares; read once a group, never copied by
            the fused implementations. Its gradients are summed over the group.
        softmax_scale: multiplies the scores; 1 / sqrt(D) by default.
        block_diagonal: a token sees the prefix and its own scale only (Switti, arXiv 2412.01819).
        backend: see `fastvar.support()`. "sdpa" (PyTorch's fused kernels), "flash_attn" (flash-attn) and "xformers" go
            a scale at a time, flash-attn-4, which "flash_attn" takes on Hopper and Blackwell, in one call. They read
            a prefix once a group and merge; prefixes of several lengths are beyond flash-attn and xFormers. "flex" is
            PyTorch's FlexAttention, compiled once a shape; it copies the prefix for every sample. Gradients by "sdpa"
            may differ in their last bits from run to run on a GPU; under `torch.use_deterministic_algorithms(True)`
            "auto" does not take it.

    Returns:
        (B, L, H, D) in q's dtype, contiguous. Softmax statistics in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a batch that the prefix's rows do not divide, a prefix of
            several lengths that the backend asked for does not take.

    Source: VAR (arXiv 2404.02905); the subject prefix is DreamVAR's (arXiv 2601.22507).
    """
    return _attend(q, k, v, schedule, prefix, softmax_scale, block_diagonal, backend, False)[0]


def block_causal_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    prefix: PrefixKV | None = None,
    softmax_scale: float | None = None,
    block_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_causal_attention`, and the logarithm of each softmax's sum (B, H, L) in float32 (float64 for float64), by
    which attention to other keys can be merged with this one. Both carry gradients."""
    return _attend(q, k, v, schedule, prefix, softmax_scale, block_diagonal, backend, True)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix: PrefixKV | None,
    softmax_scale: float | None,
    block_diagonal: bool,
    backend: str,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "block_causal_attention"
    _checks.schedule(op, schedule)
    _checks.floating(op, "q", q)
    _checks.shape(op, "q", q, "B", schedule.num_tokens, "H", "D")
    _checks.shape(op, "k", k, *q.shape)
    _checks.shape(op, "v", v, *q.shape)
    _checks.same_dtype_and_device(op, "q", q, k=k, v=v)
    if prefix is not None:
        check_shared(op, "prefix", prefix, q)
    else:
        prefix = PrefixKV(None, None)  # type: ignore[arg-type]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    arguments = (q, k, v, schedule.flat, *prefix, scale, block_diagonal)
    chosen = _OPERATOR.resolve(backend, *arguments)
    with_lse = with_lse or chosen not in ("reference", "flex")  # the other backward passes need it
    return _OPERATOR.run(chosen, *arguments, with_lse)
