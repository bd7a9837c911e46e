"""Exponential moving average of a model's weights, as a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastvar.training.sharded import local, placed_like


class EMA:
    """Averaged weights in a separate module, so that evaluation never touches the weights in training.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates: a short run is not dominated by its start.

    Args:
        model: the model in training, with a method `clone()`, or its `Blueprint` where it may be sharded: the average
            is sharded as the model then is, and `called` as such models are.
        decay: of the average, 0 to 1.
    """

    def __init__(self, model: Any, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay: expected 0 <= decay < 1, got {decay}")
        self.model: Any = model.clone().requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = ([local(p) for p in net.parameters()] for net in (self.model, model))
        get_ema_multi_avg_fn(decay)(averages, weights, self.updates)
        for own, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.model.state_dict()
        self.model.load_state_dict({name: placed_like(own.get(name), value) for name, value in state["model"].items()})
        self.updates = state["updates"]
