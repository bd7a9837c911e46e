"""Autograd for losses whose op makes the gradients in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvar.ops._dispatch import Chosen
from fastvar.ops._operator import surroundings


def wanted(leaves: Sequence[torch.Tensor | None]) -> tuple[bool, ...]:
    """Which of these tensors a loss computed now will be differentiated with respect to."""
    return tuple([torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves])


def with_gradients(
    loss: torch.Tensor,
    leaves: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor],
    needs: Sequence[bool],
    chosen: Chosen | str,
) -> torch.Tensor:
    """The loss () as a function of the leaves, given its gradients with respect to those that need one; the others'
    are not looked at. They were made by the `chosen` implementation: if it has a function `multiply(x, factor)`, that
    multiplies them."""
    if not any(needs):
        return loss
    kept = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return _WithGradients.apply(chosen, loss, *kept, *leaves)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Chosen | str, loss: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        half = len(rest) // 2
        ctx.multiply = None if isinstance(chosen, str) else getattr(chosen.module, "multiply", None)
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
        gradients: list[torch.Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                gradients.append(None)
                continue
            if keep:
                gradient = gradient * factor
            elif ctx.multiply is not None:
                with surroundings("gradient of a loss", gradient.device):
                    ctx.multiply(gradient, factor)
            else:
                gradient.mul_(factor)
            gradients.append(gradient.to(dtype))
        return None, None, *[None] * len(gradients), *gradients
