"""Normalisation, scale and rotation in C++, also straight into a cache, forward and backward: csrc/qk_norm_rope.cpp.

The functions there take any floating dtype and any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference, in float32."""
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    torch.ops.fastvar_cpu.qk_norm_rope.default(q, k, None, log_scale, rope_cos, rope_sin, eps, 0, q_out, k_out, None)
    return q_out, k_out


def into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: int,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """See the reference, in float32."""
    q_out = torch.empty(q.shape, dtype=q.dtype)
    torch.ops.fastvar_cpu.qk_norm_rope.default(
        q, k, v, log_scale, rope_cos, rope_sin, eps, position, q_out, key_cache, value_cache
    )
    return q_out


def backward(
    grads: Sequence[torch.Tensor | None],
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of q, k and log_scale, as far as they are needed; the rotary tables have none."""
    found: list[torch.Tensor | None] = []
    for t, grad, need in ((q, grads[0], needs[0]), (k, grads[1], needs[1]), (log_scale, grads[0], needs[2])):
        make = torch.zeros if grad is None else torch.empty
        found.append(make(t.shape, dtype=t.dtype) if t is not None and need else None)
    dq, dk, dlog_scale = found
    for x, grad, is_query, dx, dscale in ((q, grads[0], True, dq, dlog_scale), (k, grads[1], False, dk, None)):
        if grad is not None and (dx is not None or dscale is not None):
            torch.ops.fastvar_cpu.qk_norm_rope_backward.default(
                grad, x, log_scale, rope_cos, rope_sin, eps, is_query, dx, dscale
            )
    return [gradient for gradient in found if gradient is not None]
