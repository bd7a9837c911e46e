"""Rewards that need no model: how well an image compresses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from fastvar.rl.rewards.base import Reward, register


@register("jpeg")
class JPEGSizeReward:
    """Kilobytes of each image as a JPEG, to be made small or large.

    Args:
        larger: reward large files instead of small ones.
        quality: of the JPEG, 1 to 95.

    Raises:
        ValueError: quality out of range.

    Source: DDPO (arXiv 2305.13301), compressibility.
    """

    def __init__(self, *, larger: bool = False, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"JPEGSizeReward: quality: expected 1 to 95, got {quality}")
        self.sign = 1.0 if larger else -1.0
        self.quality = quality

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str] = (), references: torch.Tensor | None = None
    ) -> Reward:
        """Score images (B, 3, H, W) in [0, 1]."""
        from PIL import Image

        pixels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        sizes = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
            sizes.append(buffer.tell() / 1000)
        return Reward(self.sign * torch.tensor(sizes, dtype=torch.float32))
