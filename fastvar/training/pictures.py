"""Grids of images as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastvar.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image


def image_grid(images: torch.Tensor, columns: int, *, zoom: int = 1) -> Image:
    """Images (N, 3, H, W) in [0, 1] as one picture with `columns` a row, pixels repeated `zoom` times."""
    from PIL import Image as pil
    from torchvision.utils import make_grid

    images = images.detach().float().cpu().clamp(0, 1)
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
    return pil.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_picture(image: Image, path: Path) -> None:
    """Write a PNG; an interrupted write leaves no broken file behind."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
