"""A policy under wrappers for several processes (DDP, FSDP2), which act on a module's forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastvar.models import VAR


class CalledPolicy(nn.Module):
    """The policy behind a forward pass that runs any function of it: a rollout, a segment's loss.

    Args:
        policy: the model.
    """

    def __init__(self, policy: VAR) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`function(policy, *arguments, **options)`."""
        return function(self.policy, *arguments, **options)


def gather_for_methods(model: nn.Module) -> None:
    """Let blocks that FSDP2 (`fully_shard`) has sharded gather their weights for the methods that a VAR calls on them
    besides forward. Other models are left alone."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for method in ("modulate", "keys_and_values", "mix"):
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
