"""Exponential moving average of a model's weights, as a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Averaged weights in a separate module, so that evaluation never touches the weights in training.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates: a short run is not dominated by its start.

    Args:
        model: the model in training, with a method `clone()`.
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
        if any(isinstance(p, DTensor) for p in model.parameters()):
            # Sharded over processes: gathered one by one, as the average is whole everywhere.
            for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
                average.lerp_(weight.full_tensor() if isinstance(weight, DTensor) else weight, 1 - decay)
        else:
            get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), self.updates)
        for own, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
