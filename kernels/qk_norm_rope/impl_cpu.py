"""Normalisation, scale and rotation for CPUs: rotations as products of complex numbers, gradients written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MAX_LOG_SCALE = math.log(100.0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor | None,
    rope_cos: torch.Tensor | None,
    rope_sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    compute = torch.promote_types(q.dtype, torch.float32)
    q_out, k_out = q.to(compute), k.to(compute)
    if log_scale is not None:
        q_out = q_out * (_gain(log_scale, compute) / _length(q_out, eps))
        k_out = k_out / _length(k_out, eps)
    rotation = _rotation(rope_cos, rope_sin, compute)
    return _finished(q_out, rotation, q), _finished(k_out, rotation, k)


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
    """See the reference."""
    q_out, k_out = forward(q, k, log_scale, rope_cos, rope_sin, eps)
    key_cache.narrow(1, position, q.shape[1]).copy_(k_out)
    value_cache.narrow(1, position, q.shape[1]).copy_(v)
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
    compute = torch.promote_types(q.dtype, torch.float32)
    rotation = _rotation(rope_cos, rope_sin, compute)
    back = None if rotation is None else rotation.conj().resolve_conj()
    found: list[torch.Tensor] = []
    dlog_scale = None
    for x, grad, need, gain in (
        (q, grads[0], needs[0], None if log_scale is None else _gain(log_scale, compute)),
        (k, grads[1], needs[1], None),
    ):
        wants_scale = gain is not None and needs[2]
        if grad is None or not (need or wants_scale):
            if need:
                found.append(torch.zeros(x.shape, dtype=x.dtype))
            continue
        g = _rotated(grad.to(compute), back)
        if log_scale is None:
            found.append(_fresh(g, x, grad))
            continue
        wide = x.to(compute)
        length = wide.norm(dim=-1, keepdim=True)
        inverse = 1 / length.clamp(min=eps)
        along = (g * wide).sum(-1, keepdim=True) * inverse  # [B, L, H, 1]
        if wants_scale:  # over so many rows that float32 shows
            assert gain is not None
            dlog_scale = (along * gain).sum((0, 1, 3), dtype=torch.float64)
        if need:
            factor = inverse if gain is None else inverse * gain
            # a row shorter than eps is divided by a constant
            share = torch.where(length >= eps, along * inverse * factor, 0)
            found.append((g * factor).addcmul_(wide, share, value=-1).to(x.dtype).contiguous())
    if needs[2]:
        assert log_scale is not None
        if dlog_scale is None:
            dlog_scale = torch.zeros(log_scale.shape, dtype=compute)
        found.append(torch.where(log_scale.double() <= MAX_LOG_SCALE, dlog_scale, 0).to(log_scale.dtype))
    return found


def _gain(log_scale: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """exp(min(log_scale, log 100)) [H, 1]."""
    return log_scale.to(compute).clamp(max=MAX_LOG_SCALE).exp()[:, None]


def _length(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x.norm(dim=-1, keepdim=True).clamp(min=eps)


def _rotation(cos: torch.Tensor | None, sin: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor | None:
    """cos + i sin [L, 1, D/2]."""
    if cos is None or sin is None:
        return None
    return torch.complex(cos.to(compute).contiguous(), sin.to(compute).contiguous())[:, None]


def _rotated(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    if rotation is None:
        return x
    x = x.contiguous()
    if x.storage_offset() % 2:  # not where a complex number can begin
        x = x.clone()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def _finished(x: torch.Tensor, rotation: torch.Tensor | None, given: torch.Tensor) -> torch.Tensor:
    return _fresh(_rotated(x, rotation), given, given)


def _fresh(out: torch.Tensor, like: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """In the dtype of `like`, contiguous, and no view of an argument."""
    out = out.to(like.dtype).contiguous()
    return out.clone() if out.data_ptr() == argument.data_ptr() else out
