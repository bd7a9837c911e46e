"""L2 normalisation of queries and keys with a learned scale per head, then rotary positions, then the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._record import Written
from fastvar.ops._triton import triton_implementation
from fastvar.schedule import Grid, ScaleSchedule


class Rope(NamedTuple):
    """Tables (L, D/2) for the interleaved pairs (x_2i, x_2i+1)."""

    cos: torch.Tensor
    sin: torch.Tensor


class QKNormRopeCall(NamedTuple):
    """A call of `qk_norm_rope`: q and k (B, L, H, D), log_scale (H,)."""

    q: torch.Tensor
    k: torch.Tensor
    log_scale: torch.Tensor | None
    rope: Rope | None
    eps: float


class IntoCacheCall(NamedTuple):
    """A call of `qk_norm_rope_into_cache`: q, k and v (B, n, H, D), caches (B, capacity, H, D), log_scale (H,)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_cache: Written
    value_cache: Written
    position: int
    log_scale: torch.Tensor | None
    rope: Rope | None
    eps: float


def _implementations(function: str = "") -> list[Implementation]:
    folder = "fastvar.kernels.qk_norm_rope"
    return [
        triton_implementation("qk_norm_rope", function=function, verified=("H200",)),
        Implementation("torch", f"{folder}.impl_torch:{function}", devices=("cpu",), verified=("CPU",)),
        Implementation("reference", f"{folder}.reference:{function}", verified=("CPU", "H200")),
    ]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_OPERATOR = Operator(
    "qk_norm_rope",
    QKNormRopeCall,
    results=2,
    fake=lambda call: (_like(call.q), _like(call.k)),
    implementations=_implementations(),
    choices=[Choice("triton", {"sm90": "044712c"})],
)
_INTO_CACHE = Operator(
    "qk_norm_rope_into_cache",
    IntoCacheCall,
    fake=lambda call: _like(call.q),
    implementations=_implementations("into_cache"),
    choices=[Choice("triton")],
    differentiable=False,
)

Tables = Rope | tuple[torch.Tensor, torch.Tensor]


def _check(
    op: str, q: torch.Tensor, k: torch.Tensor, log_scale: torch.Tensor | None, rope: Tables | None
) -> Rope | None:
    _checks.floating(op, "q", q)
    _checks.shape(op, "q", q, "B", "L", "H", "D")
    _checks.shape(op, "k", k, *q.shape)
    _checks.same_dtype_and_device(op, "q", q, k=k)
    if log_scale is not None:
        _checks.shape(op, "log_scale", log_scale, q.shape[2])
        _checks.floating(op, "log_scale", log_scale)
        _checks.same_device(op, "q", q, log_scale=log_scale)
    if rope is None:
        return None
    if q.shape[3] % 2:
        _checks.fail(op, "q", "an even head dimension for rotary positions", q.shape[3])
    for name, table in zip(("rope cos", "rope sin"), rope, strict=True):
        _checks.shape(op, name, table, q.shape[1], q.shape[3] // 2)
        _checks.floating(op, name, table)
        _checks.same_device(op, "q", q, **{name: table})
    return Rope(rope[0].detach(), rope[1].detach())


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    log_scale: torch.Tensor | None = None,
    rope: Tables | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise queries and keys to unit length, scale the queries per head, rotate both by their positions.

        q <- rope(q / max(|q|, eps) * exp(min(log_scale, log 100))),  k <- rope(k / max(|k|, eps))

    Args:
        q, k: (B, L, H, D), any strides; usually slices of one projection.
        log_scale: (H,) the learned scale's logarithm; its gradient is cut above log 100. None: no normalisation.
        rope: tables cos, sin, each (L, D/2), for the interleaved pairs (x_2i, x_2i+1), without gradient; see
            `rope_tables`. None: none.
        eps: smallest length to divide by.
        backend: see `fastvar.support()`.

    Returns:
        q, k: (B, L, H, D) in the given dtype, contiguous; computed in float32, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: VAR's and Infinity's cosine attention (arXiv 2404.02905, 2412.04431).
    """
    tables = _check("qk_norm_rope", q, k, log_scale, rope)
    q, k = _OPERATOR(QKNormRopeCall(q, k, log_scale, tables, eps), backend)
    return q, k


def qk_norm_rope_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: int,
    *,
    log_scale: torch.Tensor | None = None,
    rope: Tables | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> torch.Tensor:
    """`qk_norm_rope` that writes the keys, and the values with them, straight into a cache.

    Args:
        q, k, v: (B, n, H, D), the projections of the new tokens.
        key_cache, value_cache: (B, capacity, H, D); rows position : position + n are overwritten.
        position: where the new tokens go.
        log_scale, rope, eps, backend: as in `qk_norm_rope`.

    Returns:
        q: (B, n, H, D), contiguous; no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, tokens beyond the capacity, or caches that share memory
            within themselves (as expanded ones do) or with q, k or v.
    """
    op = "qk_norm_rope_into_cache"
    tables = _check(op, q, k, log_scale, rope)
    _checks.shape(op, "v", v, *q.shape)
    _checks.shape(op, "key_cache", key_cache, q.shape[0], "capacity", q.shape[2], q.shape[3])
    _checks.shape(op, "value_cache", value_cache, *key_cache.shape)
    _checks.same_dtype_and_device(op, "q", q, v=v, key_cache=key_cache, value_cache=value_cache)
    _checks.writable(op, "key_cache", key_cache, q=q, k=k, v=v)
    _checks.writable(op, "value_cache", value_cache, q=q, k=k, v=v)
    if position < 0 or position + q.shape[1] > key_cache.shape[1]:
        _checks.fail(op, "position", f"0 to {key_cache.shape[1] - q.shape[1]}", position)
    return _INTO_CACHE(IntoCacheCall(q, k, v, key_cache, value_cache, position, log_scale, tables, eps), backend)


def rope_tables(
    schedule: ScaleSchedule,
    head_dim: int,
    *,
    finest: Grid | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Rope:
    """Infinity's 2-D rotary tables: half of the pairs rotate by the row, the other half by the column.

    Token (i, j) of an h x w grid stands at row round(i * H / h), column round(j * W / w) of the finest grid (H, W),
    rounding halves to even.

    Args:
        schedule: the scales of the L tokens.
        head_dim: D, divisible by 4.
        finest: (H, W); the schedule's own finest grid by default. Infinity takes the grid of its 1M-pixel budget
            at every budget.
        theta: base of the frequencies theta^(-4i / D), i < D / 4.
        device: where the tables are made.

    Returns:
        cos, sin: (L, D/2) float32.

    Raises:
        ValueError: head_dim not divisible by 4.

    Source: Infinity (arXiv 2412.04431), `rope2d_normalized_by_hw = 2`.
    """
    if head_dim % 4:
        _checks.fail("rope_tables", "head_dim", "a multiple of 4", head_dim)
    height, width = finest or schedule.finest
    frequency = theta ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2))
    angles = []
    for h, w in schedule:
        row = torch.round(torch.arange(h, dtype=torch.float32, device=device) * (height / h))
        column = torch.round(torch.arange(w, dtype=torch.float32, device=device) * (width / w))
        by_row = (row[:, None] * frequency)[:, None].expand(h, w, -1)
        by_column = (column[:, None] * frequency)[None].expand(h, w, -1)
        angles.append(torch.cat([by_row, by_column], -1).reshape(h * w, -1))
    angle = torch.cat(angles)  # [L, D/2]
    return Rope(angle.cos(), angle.sin())
