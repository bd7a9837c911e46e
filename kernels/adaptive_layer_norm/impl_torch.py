"""Adaptive layer norm and gated residual for CPUs: PyTorch's fused kernels, and gradients written out.

PyTorch's layer norm takes one weight and bias for all rows. With a sample's modulation in their place it does the whole
sample in one pass; small samples are done together. Sums over rows are not left to its backward pass: it adds them one
after the other, in an order that depends on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.adaptive_layer_norm import GateCall, GateNormCall, NormCall

SMALL = 2**15  # elements of a sample; below, a call for each sample costs more than it saves


Grads = Sequence[torch.Tensor | None]


def norm(call: NormCall | GateNormCall) -> torch.Tensor:
    """See the reference."""
    x = call.x
    batch, length, width = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    gain, shift = call.scale.to(compute) + 1, call.shift.to(compute)
    if length * width < SMALL:
        normed = F.layer_norm(x.to(compute), (width,), eps=call.eps)
        return torch.addcmul(shift[:, None], normed, gain[:, None]).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    statistics = torch.empty(2, length, 1, dtype=compute)
    for b in range(batch):
        torch.ops.aten.native_layer_norm.out(
            x[b].contiguous(), (width,), gain[b], shift[b], call.eps,
            out0=out[b], out1=statistics[0], out2=statistics[1],
        )  # fmt: skip
    return out


def norm_backward(
    call: NormCall | GateNormCall, saved: Sequence[torch.Tensor], grads: Grads, needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of x, scale and shift, as far as they are needed."""
    (grad,) = grads
    assert grad is not None
    x, width = call.x, call.x.shape[-1:]
    compute = torch.promote_types(x.dtype, torch.float32)
    wide, g = x.to(compute).contiguous(), grad.to(compute).contiguous()
    normed, mean, rstd = torch.native_layer_norm(wide, width, None, None, call.eps)
    gradients = {}
    if needs.x:
        slope = g * (call.scale.to(compute) + 1)[:, None]
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            slope, wide, width, mean, rstd, None, None, (True, False, False)
        )
        gradients["x"] = dx.to(x.dtype)
    if needs.scale:
        gradients["scale"] = (g * normed).sum(1).to(call.scale.dtype)
    if needs.shift:
        gradients["shift"] = g.sum(1).to(call.shift.dtype)
    return gradients


def gate(call: GateCall | GateNormCall) -> torch.Tensor:
    """See the reference."""
    x = call.x
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.addcmul(x.to(compute), call.y.to(compute), call.gate.to(compute)[:, None])
    return out.to(x.dtype).contiguous()


def gate_backward(
    call: GateCall | GateNormCall, saved: Sequence[torch.Tensor], grads: Grads, needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of x, y and gate, as far as they are needed."""
    (grad,) = grads
    assert grad is not None
    compute = torch.promote_types(call.x.dtype, torch.float32)
    g = grad.to(compute).contiguous()
    gradients = {"x": grad}
    if needs.y:
        gradients["y"] = (g * call.gate.to(compute)[:, None]).to(call.y.dtype)
    if needs.gate:
        gradients["gate"] = (g * call.y.to(compute).contiguous()).sum(1).to(call.gate.dtype)
    return gradients


def gate_norm(call: GateNormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    stream = gate(call)
    return stream, norm(call._replace(x=stream))


def gate_norm_backward(
    call: GateNormCall, saved: Sequence[torch.Tensor], grads: Grads, needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of x, y, gate, scale and shift, as far as they are needed: of the norm, then of the residual."""
    (stream,), (along, grad) = saved, grads
    through = needs.x or needs.y or needs.gate
    gradients: dict[str, torch.Tensor] = {}
    if grad is not None:
        gradients = norm_backward(call._replace(x=stream), (), (grad,), needs._replace(x=through))
        if through:
            along = gradients["x"] if along is None else gradients["x"].add_(along)
    return gradients | gate_backward(call, (), (along,), needs) if through else gradients
