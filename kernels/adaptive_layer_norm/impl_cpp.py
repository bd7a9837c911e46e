"""Adaptive layer norm and gated residual in C++, forward and backward: csrc/adaptive_layer_norm.cpp.

The functions there take any floating dtype and any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """See the reference, in float32."""
    return torch.ops.fastvar_cpu.adaptive_layer_norm.default(x, scale, shift, eps)


def backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of x, scale and shift, as far as they are needed."""
    found = _room((x, scale, shift), needs, grads[0])
    if grads[0] is not None:
        torch.ops.fastvar_cpu.adaptive_layer_norm_backward.default(grads[0], x, scale, eps, *found)
    return [gradient for gradient in found if gradient is not None]


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See the reference, in float32."""
    return torch.ops.fastvar_cpu.gated_residual.default(x, y, gate)


def gated_residual_backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of y and gate, as far as they are needed."""
    found = _room((y, gate), needs[1:], grads[0])
    if grads[0] is not None:
        torch.ops.fastvar_cpu.gated_residual_backward.default(grads[0], y, gate, *found)
    return [gradient for gradient in found if gradient is not None]


def gated_residual_norm(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference, in float32."""
    stream = gated_residual(x, y, gate)
    return stream, forward(stream, scale, shift, eps)


def gated_residual_norm_backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    results: Sequence[torch.Tensor],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of x, y, gate, scale and shift, as far as they are needed: of the norm, then of the residual."""
    through = any(needs[:3])
    norm = backward(grads[1:], results[0], scale, shift, eps, [through, *needs[3:]])
    stream = grads[0]
    if through:
        added = norm.pop(0)
        stream = added if stream is None else added.add_(stream)
    found = gated_residual_backward([stream], x, y, gate, needs[:3])
    if needs[0]:
        assert stream is not None
        found.insert(0, stream)
    return found + norm


def _room(
    tensors: Sequence[torch.Tensor], needs: Sequence[bool], grad: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """For the gradients that are needed, which are zero if there is no incoming one."""
    make = torch.zeros if grad is None else torch.empty
    return [make(t.shape, dtype=t.dtype) if need else None for t, need in zip(tensors, needs, strict=True)]
