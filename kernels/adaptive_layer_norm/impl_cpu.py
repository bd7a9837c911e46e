"""Adaptive layer norm and gated residual for CPUs: PyTorch's fused kernels, and gradients written out.

PyTorch's layer norm takes one weight and bias for all rows. With a sample's modulation in their place it does the whole
sample in one pass; small samples are done together. Sums over rows are not left to its backward pass: it adds them one
after the other, in an order that depends on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastvar.kernels.adaptive_layer_norm.reference import gated_residual as gated_residual

SMALL = 2**15  # elements of a sample; below, a call for each sample costs more than it saves


def forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """See the reference."""
    batch, length, width = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    gain, shift = scale.to(compute) + 1, shift.to(compute)
    if length * width < SMALL:
        normed = F.layer_norm(x.to(compute), (width,), eps=eps)
        return torch.addcmul(shift[:, None], normed, gain[:, None]).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    statistics = torch.empty(2, length, 1, dtype=compute)
    for b in range(batch):
        torch.ops.aten.native_layer_norm.out(
            x[b].contiguous(), (width,), gain[b], shift[b], eps, out0=out[b], out1=statistics[0], out2=statistics[1]
        )
    return out


def backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of x, scale and shift, as far as they are needed."""
    grad = grads[0]
    if grad is None:
        return [torch.zeros(t.shape, dtype=t.dtype) for t, need in zip((x, scale, shift), needs, strict=True) if need]
    width = x.shape[-1:]
    compute = torch.promote_types(x.dtype, torch.float32)
    wide, g = x.to(compute).contiguous(), grad.to(compute).contiguous()
    normed, mean, rstd = torch.native_layer_norm(wide, width, None, None, eps)
    found = []
    if needs[0]:
        slope = g * (scale.to(compute) + 1)[:, None]
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            slope, wide, width, mean, rstd, None, None, (True, False, False)
        )
        found.append(dx.to(x.dtype))
    if needs[1]:
        found.append((g * normed).sum(1).to(scale.dtype))
    if needs[2]:
        found.append(g.sum(1).to(shift.dtype))
    return found


def gated_residual_backward(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of y and gate, as far as they are needed."""
    grad = grads[0]
    if grad is None:
        return [torch.zeros(t.shape, dtype=t.dtype) for t, need in zip((y, gate), needs[1:], strict=True) if need]
    found = []
    compute = torch.promote_types(x.dtype, torch.float32)
    g = grad.to(compute).contiguous()
    if needs[1]:
        found.append((g * gate.to(compute)[:, None]).to(y.dtype))
    if needs[2]:
        found.append((g * y.to(compute).contiguous()).sum(1).to(gate.dtype))
    return found


def gated_residual_norm(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
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
