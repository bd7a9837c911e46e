"""Rewards of the pixels themselves, without a model: compressibility, colour."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from fastvar.pictures import to_uint8
from fastvar.rl.rewards.base import Description, Reward, register


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

    @property
    def description(self) -> Description:
        """No network."""
        return Description("none", "8 bits a channel", f"{'0 up' if self.sign > 0 else 'up to 0'}, kilobytes")

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str] = (), references: torch.Tensor | None = None
    ) -> Reward:
        """Score images (B, 3, H, W) in [0, 1]."""
        from PIL import Image

        sizes = []
        for image in to_uint8(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
            sizes.append(buffer.tell() / 1000)
        return Reward(self.sign * torch.tensor(sizes, dtype=torch.float32))


@register("colour")
class ColourReward:
    """How much a colour stands out: ten times its channel minus the mean of the two others, mean over a region.

    A reward whose optimum is known: for tests, ablations and first runs. Without a region it is decided by the whole
    image; with one, the mask says where.

    Args:
        channel: "red", "green" or "blue".
        region: (left, top, right, bottom) as shares of the image's width and height, or None for all of it.
        contrast: score a region's colour minus that of the rest of the image: what the region alone has to show.

    Raises:
        ValueError: another channel, an empty region, contrast without a region or with all of the image.
    """

    def __init__(self, *, channel: str = "red", region: Sequence[float] | None = None, contrast: bool = False) -> None:
        if channel not in _CHANNELS:
            raise ValueError(f"ColourReward: channel: expected one of {_CHANNELS}, got {channel!r}")
        if region is not None and not (
            len(region) == 4 and 0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1
        ):
            raise ValueError(f"ColourReward: region: expected left < right and top < bottom in [0, 1], got {region}")
        if contrast and (region is None or (region[2] - region[0]) * (region[3] - region[1]) >= 0.9):
            raise ValueError(f"ColourReward: contrast: expected a region that is a part of the image, got {region}")
        self.channel, self.region, self.contrast = _CHANNELS.index(channel), region, contrast

    @property
    def description(self) -> Description:
        """No network."""
        return Description("none", "none", "-20 to 20" if self.contrast else "-10 to 10")

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str] = (), references: torch.Tensor | None = None
    ) -> Reward:
        """Score images (B, 3, H, W) in [0, 1]; from -10 to 10, with contrast to twice that."""
        others = [c for c in range(3) if c != self.channel]
        excess = 10 * (images[:, self.channel] - images[:, others].mean(1))  # [B, H, W]
        if self.region is None:
            return Reward(excess.mean((1, 2)))
        height, width = images.shape[-2:]
        left, top, right, bottom = self.region
        rows = slice(int(top * height), max(-int(-bottom * height // 1), int(top * height) + 1))
        columns = slice(int(left * width), max(-int(-right * width // 1), int(left * width) + 1))
        mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=images.device)
        mask[:, rows, columns] = True
        inside = excess[:, rows, columns].mean((1, 2))
        if not self.contrast:
            return Reward(inside, mask)
        rest = torch.where(mask, 0, excess).sum((1, 2)) / (~mask).sum((1, 2))
        return Reward(inside - rest, mask)


_CHANNELS = ("red", "green", "blue")
