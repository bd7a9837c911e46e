"""The reward by HPSv2: which of two images for a prompt people would prefer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastvar.rl.rewards.base import register
from fastvar.rl.rewards.models import ModelReward
from fastvar.rl.rewards.openclip import OpenCLIP
from fastvar.rl.rewards.preprocessing import pad_square


@register("hpsv2")
class HPSv2Reward(ModelReward):
    """HPSv2: the cosine of image and prompt in a CLIP tuned on preferences, in [-1, 1].

    The longer side becomes 224 (bicubic, antialias) and black borders fill the square: nothing is cut off.

    Args:
        checkpoint: the path of the tuned weights (HPS_v2_compressed.pt or HPS_v2.1_compressed.pt), or None for random
            weights (for tests). No tag: CLIP's own weights are not HPSv2.
        model: the architecture in open_clip that the weights are of.
        batch_size, device: as `ModelReward`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: an unknown model; a checkpoint that is no file or does not fit.

    Source: HPSv2 (arXiv 2306.09341).
    """

    preprocessing = "the longer side becomes the model's (bicubic, antialias), black borders, CLIP's statistics"
    scores = "-1 to 1"

    def __init__(
        self,
        *,
        checkpoint: str | Path | None,
        model: str = "ViT-H-14",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(f"HPSv2Reward: checkpoint: expected the path of a file, got {str(checkpoint)!r}")
        self.clip = OpenCLIP(type(self).__name__, model, checkpoint, batch_size)

    def networks(self) -> dict[str, nn.Module]:
        return {self.clip.name: self.clip.model}

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        self.check_prompts(images, prompts)
        features = self.clip.images(images, pad_square)
        return (features * self.clip.texts(prompts, images.device)).sum(-1)
