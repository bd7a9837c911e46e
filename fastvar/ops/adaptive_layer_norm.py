"""Adaptive layer norm and the gated residual of AdaLN blocks, apart and in one."""

from __future__ import annotations

import torch

from fastvar.ops import _checks
from fastvar.ops._dispatch import Implementation
from fastvar.ops._positional import PositionalOperator
from fastvar.ops._triton import triton_implementation

_KERNELS = "fastvar.kernels.adaptive_layer_norm"
_IMPLEMENTATIONS = [
    triton_implementation("adaptive_layer_norm"),
    Implementation("cpu", f"{_KERNELS}.impl_cpu", devices=("cpu",), verified=("CPU",)),
    Implementation("reference", f"{_KERNELS}.reference", verified=("CPU",)),
]


def _like_x(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_NORM = PositionalOperator(
    "adaptive_layer_norm",
    "Tensor x, Tensor scale, Tensor shift, float eps",
    "Tensor",
    fake=_like_x,
    implementations=_IMPLEMENTATIONS,
)
_GATE = PositionalOperator(
    "gated_residual",
    "Tensor x, Tensor y, Tensor gate",
    "Tensor",
    fake=_like_x,
    implementations=_IMPLEMENTATIONS,
    function="gated_residual",
    passes=0,
)
_GATE_NORM = PositionalOperator(
    "gated_residual_norm",
    "Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps",
    "(Tensor, Tensor)",
    fake=lambda x, *_: (_like_x(x), _like_x(x)),
    implementations=_IMPLEMENTATIONS,
    function="gated_residual_norm",
    keeps_results=1,
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
    return _NORM(backend, x, scale, shift, eps)


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
    return _GATE(backend, x, y, gate)


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
    residual, normed = _GATE_NORM(backend, x, y, gate, scale, shift, eps)
    return residual, normed


def _check(op: str, x: torch.Tensor, y: torch.Tensor | None = None, **modulations: torch.Tensor) -> None:
    _checks.shape(op, "x", x, "B", "L", "C")
    _checks.floating(op, "x", x)
    if y is not None:
        _checks.shape(op, "y", y, *x.shape)
        _checks.floating(op, "y", y)
        _checks.same_device(op, "x", x, y=y)
    for name, modulation in modulations.items():
        _checks.shape(op, name, modulation, x.shape[0], x.shape[2])
        _checks.floating(op, name, modulation)
    _checks.same_device(op, "x", x, **modulations)
