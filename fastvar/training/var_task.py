"""Training of a VAR: the negative log-likelihood of a tokenizer's tokens under teacher forcing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import nn

from fastvar.models import VAR

if TYPE_CHECKING:
    from PIL.Image import Image


class VARTask:
    """Predict each scale's tokens from the coarser ones, the condition and, if the model has one, the subject.

    A batch holds `image` (B, 3, H, W) in [-1, 1], or its `tokens` (B, L) if they were computed before; the condition
    under `label` (class indices) or `text`; and for a model with a subject prefix `reference` (B, 3, H, W) or
    `reference_tokens` (B, L).

    Args:
        model: a VAR with its tokenizer attached, which stays frozen.
        draw: called with the averaged model for a picture of samples.
    """

    name = "var"

    def __init__(self, model: VAR, draw: Callable[[VAR], Image] | None = None) -> None:
        self.model = model
        self.identity = {"tokenizer": crc32(model.tokenizer.codebook.detach().cpu().numpy().tobytes())}
        self.draw = draw
        model.tokenizer.requires_grad_(False).eval()

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        var, device = self.model, self.model.device
        tokens = self._tokens(batch, "tokens", "image", device)
        inputs = var.tokenizer.teacher_forcing(tokens)
        subject = None
        if var.config.subject != "none":
            subject = var.tokenizer.pyramid(self._tokens(batch, "reference_tokens", "reference", device))
        labels = batch["text" if var.config.text_length else "label"]
        found = model(labels, inputs, subject=subject, tokens=tokens)
        scale = var.scale_index.expand_as(tokens)
        loss = -found.log_probs.mean()
        return loss, {
            "entropy": found.entropy.detach().mean(),
            "loss_coarsest": -found.log_probs.detach()[scale == 0].mean(),
            "loss_finest": -found.log_probs.detach()[scale == len(var.schedule) - 1].mean(),
        }

    def _tokens(self, batch: Any, cached: str, image: str, device: torch.device) -> torch.Tensor:
        if cached in batch:
            return batch[cached].to(device, non_blocking=True)
        return self.model.tokenizer.encode(batch[image].to(device, non_blocking=True))

    def picture(self, model: VAR) -> Image | None:
        return None if self.draw is None else self.draw(model)
