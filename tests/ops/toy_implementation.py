"""A second implementation of adaptive_layer_norm for test_dispatch.py: it answers and remembers how it was called."""

from __future__ import annotations

import torch

calls: list[str] = []


def forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """x + scale, by a product that autocast would round to bfloat16."""
    calls.append("forward, autocast" if torch.is_autocast_enabled(x.device.type) else "forward")
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    return x @ identity + scale[:, None]


def backward(
    grads: list[torch.Tensor | None],
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Not the gradient: 1, 2 and 3 for x, scale and shift, so that its caller shows."""
    calls.append("backward, autocast" if torch.is_autocast_enabled(x.device.type) else "backward")
    constants = zip((x, scale, shift), (1.0, 2.0, 3.0), needs, strict=True)
    return [torch.full(tensor.shape, value, dtype=tensor.dtype) for tensor, value, need in constants if need]
