"""Adaptive layer norm and the gated residual of AdaLN blocks, apart and in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Grads, Operator
from fastvar.ops._triton import triton_implementation


class NormCall(NamedTuple):
    """A call of `adaptive_layer_norm`: x (B, L, C), scale and shift (B, C)."""

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    eps: float


class GateCall(NamedTuple):
    """A call of `gated_residual`: x and y (B, L, C), gate (B, C)."""

    x: torch.Tensor
    y: torch.Tensor
    gate: torch.Tensor


class GateNormCall(NamedTuple):
    """A call of `gated_residual_norm`: x and y (B, L, C), the modulations (B, C)."""

    x: torch.Tensor
    y: torch.Tensor
    gate: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    eps: float


class _Gate(Operator[GateCall]):
    """The gradient of x is the incoming one, which autograd hands on without a copy."""

    def gradients(
        self, values: Sequence[Any], saved: Sequence[torch.Tensor], grads: Grads, needs: Sequence[bool], chosen: Any
    ) -> list[torch.Tensor | None]:
        gradients = super().gradients(values, saved, grads, [False, *needs[1:]], chosen)
        if needs[0] and grads[0] is not None:
            gradients[0] = grads[0].contiguous()
        return gradients


def _implementations(function: str, saves: tuple[int, ...] = ()) -> list[Implementation]:
    folder = "fastvar.kernels.adaptive_layer_norm"
    return [
        triton_implementation(
            "adaptive_layer_norm", function=function, verified=("H200 (before its last change)",), saves=saves
        ),
        Implementation("torch", f"{folder}.impl_torch:{function}", devices=("cpu",), verified=("CPU",), saves=saves),
        Implementation("reference", f"{folder}.reference:{function}", verified=("CPU", "H200")),
    ]


def _like_x(call: NormCall | GateCall | GateNormCall) -> torch.Tensor:
    return torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)


_NORM = Operator(
    "adaptive_layer_norm",
    NormCall,
    fake=_like_x,
    implementations=_implementations("norm"),
    choices=[Choice("triton", {"sm90": "b11f690"})],
)
_GATE = _Gate(
    "gated_residual",
    GateCall,
    fake=_like_x,
    implementations=_implementations("gate"),
    choices=[Choice("triton", {"sm90": "b11f690"})],
)
_GATE_NORM = Operator(
    "gated_residual_norm",
    GateNormCall,
    results=2,
    fake=lambda call: (_like_x(call), _like_x(call)),
    implementations=_implementations("gate_norm", saves=(0,)),
    choices=[Choice("triton", {"sm90": "b11f690"})],
)


def adaptive_layer_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the layer norm without weights of its own.

    Args:
        x: (B, L, C), any strides.
        scale: (B, C), one modulation per sample; any floating dtype.
        shift: (B, C).
        eps: added to the variance.
        backend: see `fastvar.support()`.

    Returns:
        (B, L, C) in x's dtype, contiguous. Statistics and arithmetic in float32 (float64 for float64 input), rounded
        once at the end.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that is not floating.

    Source: DiT (arXiv 2212.09748) as used by VAR (arXiv 2404.02905).
    """
    _check("adaptive_layer_norm", x, scale=scale, shift=shift)
    return _NORM(NormCall(x, scale, shift, eps), backend)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x + gate * y, the residual of an AdaLN block.

    Args:
        x: (B, L, C), the residual stream.
        y: (B, L, C), what the attention or the MLP answered; any floating dtype.
        gate: (B, C), one gate per sample; any floating dtype.
        backend: see `fastvar.support()`.

    Returns:
        (B, L, C) in x's dtype, contiguous; computed in float32 (float64 for float64 input) and rounded once.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that is not floating.
    """
    _check("gated_residual", x, y, gate=gate)
    return _GATE(GateCall(x, y, gate), backend)


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual of one half of an AdaLN block and the norm at the beginning of the next, in one.

    The same as `gated_residual` followed by `adaptive_layer_norm`, roundings and gradients included: the residual is
    rounded to x's dtype before it is normalised, and so are both gradients that meet there.

    Args:
        x: (B, L, C), the residual stream.
        y: (B, L, C), what the attention or the MLP answered; any floating dtype.
        gate, scale, shift: (B, C), one modulation per sample; any floating dtype.
        eps: added to the variance.
        backend: see `fastvar.support()`.

    Returns:
        residual, x + gate * y, and normed, LayerNorm(residual) * (1 + scale) + shift: (B, L, C) in x's dtype,
        contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that is not floating.
    """
    _check("gated_residual_norm", x, y, gate=gate, scale=scale, shift=shift)
    residual, normed = _GATE_NORM(GateNormCall(x, y, gate, scale, shift, eps), backend)
    return residual, normed


def _check(op: str, x: torch.Tensor, y: torch.Tensor | None = None, **modulations: torch.Tensor) -> None:
    _checks.shape(op, "x", x, "B", "L", "C")
    _checks.floating(op, "x", x)
    if y is not None:
        _checks.same_shape(op, "y", y, x.shape)
        _checks.floating(op, "y", y)
    expected = (x.shape[0], x.shape[2])
    for name, modulation in modulations.items():
        _checks.same_shape(op, name, modulation, expected)
        _checks.floating(op, name, modulation)
    _checks.same_device(op, "x", x, y=y, **modulations)
