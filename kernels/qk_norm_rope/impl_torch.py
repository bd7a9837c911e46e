"""Normalisation, scale and rotation for CPUs: rotations as products of complex numbers, gradients written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastvar.ops.qk_norm_rope import IntoCacheCall, QKNormRopeCall, Rope

MAX_LOG_SCALE = math.log(100.0)


def forward(call: QKNormRopeCall | IntoCacheCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    q, k = call.q.to(compute), call.k.to(compute)
    if call.log_scale is not None:
        q = q * (_gain(call.log_scale, compute) / _length(q, call.eps))
        k = k / _length(k, call.eps)
    rotation = _rotation(call.rope, compute)
    return _finished(q, rotation, call.q), _finished(k, rotation, call.k)


def into_cache(call: IntoCacheCall) -> torch.Tensor:
    """See the reference."""
    q, k = forward(call)
    call.key_cache.narrow(1, call.position, k.shape[1]).copy_(k)
    call.value_cache.narrow(1, call.position, k.shape[1]).copy_(call.v)
    return q


def backward(
    call: QKNormRopeCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of q, k and log_scale, as far as they are needed; the rotary tables have none."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    rotation = _rotation(call.rope, compute)
    back = None if rotation is None else rotation.conj().resolve_conj()
    gradients: dict[str, torch.Tensor] = {}
    for name, x, grad in (("q", call.q, grads[0]), ("k", call.k, grads[1])):
        need = getattr(needs, name)
        gain = _gain(call.log_scale, compute) if name == "q" and call.log_scale is not None else None
        wants_scale = gain is not None and needs.log_scale
        if grad is None or not (need or wants_scale):
            continue
        g = _rotated(grad.to(compute), back)
        if call.log_scale is None:
            gradients[name] = _fresh(g, x, grad)
            continue
        wide = x.to(compute)
        length = wide.norm(dim=-1, keepdim=True)
        inverse = 1 / length.clamp(min=call.eps)
        along = (g * wide).sum(-1, keepdim=True) * inverse  # [B, L, H, 1]
        if gain is not None and wants_scale:  # over so many rows that float32 shows
            dlog_scale = (along * gain).sum((0, 1, 3), dtype=torch.float64)
            below = call.log_scale.double() <= MAX_LOG_SCALE
            gradients["log_scale"] = torch.where(below, dlog_scale, 0).to(call.log_scale.dtype)
        if need:
            factor = inverse if gain is None else inverse * gain
            # a row shorter than eps is divided by a constant
            share = torch.where(length >= call.eps, along * inverse * factor, 0)
            gradients[name] = (g * factor).addcmul_(wide, share, value=-1).to(x.dtype).contiguous()
    return gradients


def _gain(log_scale: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """exp(min(log_scale, log 100)) [H, 1]."""
    return log_scale.to(compute).clamp(max=MAX_LOG_SCALE).exp()[:, None]


def _length(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x.norm(dim=-1, keepdim=True).clamp(min=eps)


def _rotation(rope: Rope | None, compute: torch.dtype) -> torch.Tensor | None:
    """cos + i sin [L, 1, D/2]."""
    if rope is None:
        return None
    return torch.complex(rope.cos.to(compute).contiguous(), rope.sin.to(compute).contiguous())[:, None]


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
