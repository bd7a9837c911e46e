"""Autograd for losses whose op makes the gradients in the forward pass."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from fastvar.ops._operator import surroundings


def wanted(*leaves: torch.Tensor | None) -> list[bool]:
    """Which of these tensors a loss computed now will be differentiated with respect to."""
    return [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]


def with_gradients(
    loss: torch.Tensor,
    leaves: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor],
    needs: Sequence[bool],
    backend: str,
) -> torch.Tensor:
    """The loss () as a function of the leaves, given its gradients with respect to those that need one; the others'
    are not looked at. The backend is the one that made them."""
    if not any(needs):
        return loss
    kept = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return _WithGradients.apply(backend, loss, *kept, *leaves)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, loss: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        half = len(rest) // 2
        ctx.backend = backend
        ctx.save_for_backward(*rest[:half])
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in rest[half:]]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        """In place, unless the graph is kept: then another backward pass needs what was saved. Being of one dimension,
        the factor is not rounded to the gradients' dtype."""
        factor = incoming.reshape(1)
        keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        found: list[torch.Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                found.append(None)
                continue
            if keep:
                gradient = gradient * factor
            elif ctx.backend == "triton":
                with surroundings("gradient of a loss", gradient.device):
                    _triton().multiply(gradient, factor)
            else:
                gradient.mul_(factor)
            found.append(gradient.to(dtype))
        return None, None, *[None] * len(found), *found


def _triton() -> Any:
    return importlib.import_module("fastvar.kernels.token_log_probs.impl_triton")
