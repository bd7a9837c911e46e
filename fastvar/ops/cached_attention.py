"""Attention of one scale's queries to a key-value cache, for sampling."""

from __future__ import annotations

import torch

from fastvar.ops import _checks
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation
from fastvar.ops.block_causal_attention import PrefixKV, check_shared


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_OPERATOR = Operator(
    "cached_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_lengths, "
    "Tensor? trunk_k, Tensor? trunk_v, float softmax_scale",
    "Tensor",
    fake=_fake,
    implementations=[
        triton_implementation("cached_attention"),
        Implementation("cpu", "fastvar.kernels.cached_attention.impl_cpu", devices=("cpu",), verified=("CPU",)),
        Implementation("reference", "fastvar.kernels.cached_attention.reference", verified=("CPU",)),
    ],
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
    else:
        prefix = PrefixKV(None, None)  # type: ignore[arg-type]
    if trunk is not None:
        check_shared(op, "trunk", trunk, q)
        if trunk.lengths is not None:
            _checks.fail(op, "trunk.lengths", "None", "a tensor")
    else:
        trunk = PrefixKV(None, None)  # type: ignore[arg-type]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _OPERATOR(backend, q, k, v, *prefix, trunk.k, trunk.v, scale)
