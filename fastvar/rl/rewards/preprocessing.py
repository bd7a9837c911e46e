"""Images as the reward models want them: tensors in, tensors out, on their own device.

Each function takes images (B, 3, H, W) in [0, 1]. Resampling is torchvision's, bicubic with antialiasing, which is what
the models' own PIL pipelines do but for the rounding to 8 bits; values that overshoot are cut off, as 8 bits would.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvar.rl.rewards.models import require

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Statistics = tuple[float, float, float]


def crop_square(
    images: Tensor,
    size: int = 224,
    *,
    resize: int | None = None,
    mean: Statistics = CLIP_MEAN,
    std: Statistics = CLIP_STD,
) -> Tensor:
    """The shorter side becomes `resize` (default: `size`), the centre is cut out, channels are normalised.

    CLIP: the defaults. DINO: `resize=248` with ImageNet's statistics.

    Returns:
        (B, 3, size, size) float32.
    """
    functional = _functional()
    images = _resize(images, [size if resize is None else resize])
    images = functional.center_crop(images, [size, size])
    return functional.normalize(images, list(mean), list(std))


def pad_square(images: Tensor, size: int = 224, *, mean: Statistics = CLIP_MEAN, std: Statistics = CLIP_STD) -> Tensor:
    """The longer side becomes `size`, black borders fill the square, channels are normalised afterwards (HPSv2).

    Nothing is cut off. The odd pixel of border goes to the right or the bottom.

    Returns:
        (B, 3, size, size) float32.
    """
    functional = _functional()
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    # At least one pixel: the shorter side of a very long image would vanish.
    height, width = max(round(height * scale), 1), max(round(width * scale), 1)
    images = _resize(images, [height, width])
    left, top = (size - width) // 2, (size - height) // 2
    images = functional.pad(images, [left, top, size - width - left, size - height - top], fill=[0.0])
    return functional.normalize(images, list(mean), list(std))


def _functional() -> Any:
    return require("torchvision.transforms.v2.functional")


def _resize(images: Tensor, size: list[int]) -> Tensor:
    bicubic = require("torchvision.transforms").InterpolationMode.BICUBIC
    return _functional().resize(images.float(), size, interpolation=bicubic, antialias=True).clamp(0, 1)
