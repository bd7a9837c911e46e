"""Training of a tokenizer: reconstruction and what its quantiser adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models import BSQTokenizer, VQTokenizer
from fastvar.pictures import image_grid

if TYPE_CHECKING:
    from PIL.Image import Image


_Tokenizer = TypeVar("_Tokenizer", VQTokenizer, BSQTokenizer)


class TokenizerTask(Generic[_Tokenizer]):
    """Reconstruct images through the codebook, or through bits.

    The loss is mean |x - y| + mean (x - y)^2, with the tokenizer's gain on colour if it has one, plus its quantisation
    loss. It has neither a perceptual nor an adversarial term; subclass `reconstruction_loss` to add one.

    Args:
        model: the tokenizer.
        examples: (N, 3, H, W) in [-1, 1], shown beside their reconstructions.
    """

    name = "tokenizer"

    def __init__(self, model: _Tokenizer, examples: torch.Tensor | None = None) -> None:
        self.model: _Tokenizer = model
        self.identity: dict[str, Any] = {}
        self.examples = examples

    def reconstruction_loss(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """The scalar that says how far (B, 3, H, W) is from (B, 3, H, W)."""
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images)

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = batch["image"].to(next(model.parameters()).device, non_blocking=True)
        out = model(images)
        shown, made = images, out.reconstruction.float()
        if isinstance(self.model, VQTokenizer):
            shown, made = (self.model.enlarge_chroma(x) for x in (shown, made))
        reconstruction = self.reconstruction_loss(shown, made)
        return reconstruction + out.quantization_loss, {
            "reconstruction": reconstruction,
            "quantization": out.quantization_loss,
            "codes_used": (out.usage > 0).float().mean(),
        }

    def tensors(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"image": batch["image"].to(next(self.model.parameters()).device, non_blocking=True)}

    def picture(self, model: _Tokenizer) -> Image | None:
        """Examples in the upper row, their reconstructions in the lower one."""
        if self.examples is None:
            return None
        shown = self.examples.to(next(model.parameters()).device)
        pairs = torch.cat([shown, model.decode(model.encode(shown))])
        return image_grid(pairs * 0.5 + 0.5, len(shown), zoom=2)
