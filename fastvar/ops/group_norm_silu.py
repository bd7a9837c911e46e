"""Group norm followed by SiLU, over rows of channels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation


class GroupNormCall(NamedTuple):
    """A call of `group_norm_silu`: x (B, N, C), weight, bias and shift (C,)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor | None
    groups: int
    eps: float
    silu: bool


_NORM = Operator(
    "group_norm_silu",
    GroupNormCall,
    fake=lambda call: torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device),
    implementations=[
        triton_implementation("group_norm_silu", verified=("H200 (before its last change)",)),
        Implementation("reference", "fastvar.kernels.group_norm_silu.reference", verified=("CPU", "H200")),
    ],
    choices=[Choice("triton")],
)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """SiLU(GroupNorm(x + shift)), with x as rows of channels.

    An image (B, C, H, W) whose channels are adjacent in memory (channels-last) is
    `image.permute(0, 2, 3, 1).flatten(1, 2)`, without a copy.

    Args:
        x: (B, N, C), any strides.
        weight, bias: (C,), of the norm; any floating dtype.
        groups: a divisor of C; adjacent channels belong together.
        eps: added to the variance.
        shift: (C,), added to x before, such as the bias of the convolution that made it; None for nothing.
        silu: whether SiLU follows.
        backend: see `fastvar.support()`.

    Returns:
        (B, N, C) in x's dtype, contiguous. Statistics, over a group's channels and all N rows, and arithmetic in
        float32 (float64 for float64 input), rounded once at the end.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a number of groups that does not divide C.

    Source: group norm (arXiv 1803.08494) as in the autoencoders of VQGAN (arXiv 2012.09841).
    """
    op = "group_norm_silu"
    _checks.shape(op, "x", x, "B", "N", "C")
    _checks.floating(op, "x", x)
    channels = x.shape[2]
    if groups < 1 or channels % groups or not channels:
        _checks.fail(op, "groups", f"a divisor of {channels} channels", groups)
    for name, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        if tensor is not None:
            _checks.shape(op, name, tensor, channels)
            _checks.floating(op, name, tensor)
    _checks.same_device(op, "x", x, weight=weight, bias=bias, shift=shift)
    return _NORM(GroupNormCall(x, weight, bias, shift, groups, eps, silu), backend)
