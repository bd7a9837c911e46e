"""Training of a VAR: the negative log-likelihood of a tokenizer's tokens under teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        label_smoothing: of the loss; see `fastvar.ops.cross_entropy`.
        scale_weights: (K,) how much a token of each scale counts; all alike by default.

    Raises:
        ValueError: another number of weights than of scales.
    """

    name = "var"

    def __init__(
        self,
        model: VAR,
        draw: Callable[[VAR], Image] | None = None,
        *,
        label_smoothing: float = 0.0,
        scale_weights: Sequence[float] | None = None,
    ) -> None:
        if scale_weights is not None and len(scale_weights) != len(model.schedule):
            raise ValueError(
                f"VARTask: scale_weights: expected {len(model.schedule)} numbers, one for each scale, "
                f"got {len(scale_weights)}"
            )
        self.model = model
        self.identity = {
            "tokenizer": crc32(model.tokenizer.codebook.detach().cpu().numpy().tobytes()),
            "loss": {
                **({"label_smoothing": label_smoothing} if label_smoothing else {}),
                **({"scale_weights": list(scale_weights)} if scale_weights is not None else {}),
            },
        }
        self.draw = draw
        self.label_smoothing = label_smoothing
        self.token_weights: torch.Tensor | None = None
        if scale_weights is not None:
            self.token_weights = torch.tensor(scale_weights, dtype=torch.float32)[model.scale_index.cpu()]  # [L]
        model.tokenizer.requires_grad_(False).eval()

    def check_data(self, dataset: Any) -> None:
        """Raise a ValueError if a data set that names or counts its classes has others than the model."""
        config = self.model.config
        names, count = getattr(dataset, "classes", None), getattr(dataset, "num_classes", None)
        if config.text_length or count is None:
            return
        if count != config.num_classes:
            raise ValueError(f"VARTask: model: expected {count} classes, as the data has, got {config.num_classes}")
        if config.class_names and names is not None and list(config.class_names) != list(names):
            first, other = next(pair for pair in zip(config.class_names, names, strict=True) if pair[0] != pair[1])
            raise ValueError(
                f"VARTask: model: expected the classes of the data in their order, got {first!r} where the data has "
                f"{other!r}; ImageFolder(..., classes=model.config.class_names) takes the model's"
            )

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        var, device = self.model, self.model.device
        if "tokens" in batch:
            tokens = batch["tokens"].to(device, non_blocking=True)
            inputs = var.tokenizer.teacher_forcing(tokens)
        else:
            quantized = var.tokenizer.quantize(batch["image"].to(device, non_blocking=True))
            tokens, inputs = quantized.tokens, quantized.teacher_forcing
        subject = None
        if var.config.subject != "none":
            subject = var.pyramid(self._reference_tokens(batch, device))
        labels = batch["text" if var.config.text_length else "label"]
        if self.token_weights is not None:
            self.token_weights = self.token_weights.to(device)
        options = {"label_smoothing": self.label_smoothing, "token_weights": self.token_weights}
        scores = model(labels, inputs, subject=subject, tokens=tokens, **options)
        return scores.loss, {
            "entropy": scores.entropy.mean(),
            "loss_coarsest": scores.losses[:, : var.schedule.ends[0]].mean(),
            "loss_finest": scores.losses[:, var.schedule.starts[-1] :].mean(),
        }

    def tensors(self, batch: Any) -> dict[str, torch.Tensor]:
        labels = "text" if self.model.config.text_length else "label"
        names = ["tokens" if "tokens" in batch else "image"]
        if self.model.config.subject != "none":
            names.append("reference_tokens" if "reference_tokens" in batch else "reference")
        tensors = {name: batch[name].to(self.model.device, non_blocking=True) for name in names}
        return {**tensors, labels: self.model.indices(batch[labels])}

    def _reference_tokens(self, batch: Any, device: torch.device) -> torch.Tensor:
        if "reference_tokens" in batch:
            return batch["reference_tokens"].to(device, non_blocking=True)
        return self.model.tokenizer.encode(batch["reference"].to(device, non_blocking=True))

    def picture(self, model: VAR) -> Image | None:
        return None if self.draw is None else self.draw(model)
