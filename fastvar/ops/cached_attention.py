"""Attention of one scale's queries to a key-value cache, for sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation
from fastvar.ops.block_causal_attention import PrefixKV, check_shared


class CachedAttentionCall(NamedTuple):
    """A call of `cached_attention`: q (B, n, H, D), a row's own keys and values (B, S, H, D), and what rows share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix: PrefixKV | None
    trunk: PrefixKV | None
    softmax_scale: float

    @property
    def parts(self) -> list[PrefixKV]:
        """All keys and values, (B / share, N, H, D) each, in their order."""
        return [part for part in (self.prefix, self.trunk, PrefixKV(self.k, self.v)) if part is not None]

    @property
    def shared(self) -> tuple[bool, bool]:
        return self.prefix is not None, self.prefix is not None and self.prefix.lengths is not None


_OPERATOR = Operator(
    "cached_attention",
    CachedAttentionCall,
    fake=lambda call: torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device),
    implementations=[
        triton_implementation("cached_attention", verified=("H200",)),
        Implementation("torch", "fastvar.kernels.cached_attention.impl_torch", devices=("cpu",), verified=("CPU",)),
        Implementation("reference", "fastvar.kernels.cached_attention.reference", verified=("CPU", "H200")),
    ],
    # In a CUDA graph, as sampling calls it; a plain call of few tokens costs the host more than SDPA's.
    choices=[Choice("triton", {"sm90": "044712c"})],
    differentiable=False,
)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    prefix: PrefixKV | None = None,
    trunk: PrefixKV | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of new queries to everything sampled so far: prefix, trunk, then the sample's own keys. No mask.

    Args:
        q: (B, n, H, D), the queries of the current scale.
        k, v: (B, S, H, D), the sample's own keys and values including the current scale's; usually the filled part of
            a preallocated cache, so any strides.
        prefix: tokens before the image that a group shares, see `PrefixKV`.
        trunk: the keys and values of a sampled state that several continuations fork from; batch row b reads
            row b // F of them. All of it is visible: `lengths` must be None.
        softmax_scale: multiplies the scores; 1 / sqrt(D) by default.
        backend: see `fastvar.support()`.

    Returns:
        (B, n, H, D) in q's dtype, contiguous; no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "cached_attention"
    _checks.floating(op, "q", q)
    _checks.shape(op, "q", q, "B", "n", "H", "D")
    _checks.shape(op, "k", k, q.shape[0], "S", q.shape[2], q.shape[3])
    _checks.shape(op, "v", v, *k.shape)
    _checks.same_dtype_and_device(op, "q", q, k=k, v=v)
    if prefix is not None:
        check_shared(op, "prefix", prefix, q)
    if trunk is not None:
        check_shared(op, "trunk", trunk, q)
        if trunk.lengths is not None:
            _checks.fail(op, "trunk.lengths", "None", "a tensor")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _OPERATOR(CachedAttentionCall(q, k, v, prefix, trunk, scale), backend)
