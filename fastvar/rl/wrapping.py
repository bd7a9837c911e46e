"""A policy under wrappers for several processes (DDP, FSDP2), which act on a module's forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastvar.models import Model
from fastvar.training.sharded import gather_for_methods as gather_for_methods
from fastvar.training.sharded import name_blocks


class CalledPolicy(nn.Module):
    """The policy behind a forward pass that runs any function of it: a rollout, a segment's loss.

    Args:
        policy: the model.
    """

    def __init__(self, policy: Model) -> None:
        super().__init__()
        self.policy = policy
        name_blocks(self, policy.blocks)

    def forward(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`function(policy, *arguments, **options)`."""
        return function(self.policy, *arguments, **options)
