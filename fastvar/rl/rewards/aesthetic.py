"""The reward by LAION's aesthetic predictor: how much people would like an image, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastvar.rl.rewards.base import register
from fastvar.rl.rewards.models import ModelReward, freeze, load_weights, weights_name
from fastvar.rl.rewards.openclip import CROPPED, OpenCLIP


class AestheticHead(nn.Module):
    """Five linear layers from a unit embedding (B, width) to a score (B,).

    There is no activation between them: the whole is an affine function, kept in layers since its weights come so. The
    dropout of its training is kept for the numbers in the keys, layers.{0,2,4,6,7}.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding).squeeze(-1)


@register("aesthetic")
class AestheticReward(ModelReward):
    """LAION's aesthetic score: an affine function of CLIP's unit embedding; people's 1 to 10.

    Args:
        pretrained: CLIP's weights as for `CLIPTextReward`; the published head belongs to "openai".
        head: the path of the head's state dict (LAION's sac+logos+ava1-l14-linearMSE.pth), or None for random weights
            (for tests).
        model: an architecture of open_clip; the published head belongs to ViT-L/14, whose embedding has 768 numbers.
        batch_size, device: as `ModelReward`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: a model, weights or head that are unknown or do not fit each other.

    Source: LAION-Aesthetics predictor V2 (github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    preprocessing = CROPPED
    scores = "about 1 to 10"

    def __init__(
        self,
        *,
        pretrained: str | Path | None,
        head: str | Path | None,
        model: str = "ViT-L-14-quickgelu",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        self.clip = OpenCLIP(type(self).__name__, model, pretrained, batch_size)
        network = AestheticHead(self.clip.width)
        if head is not None:
            load_weights(network, head, "AestheticReward: head")
        self.head = freeze(network)
        self._head_name = f"a linear head, {weights_name(head)}"

    def networks(self) -> dict[str, nn.Module]:
        return {self.clip.name: self.clip.model, self._head_name: self.head}

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        return self.head.to(images.device)(self.clip.images(images))
