"""Rewards by CLIP: likeness of an image to its prompt, and to reference images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastvar.rl.rewards.base import Description, register
from fastvar.rl.rewards.models import ModelReward, ReferenceReward
from fastvar.rl.rewards.openclip import CROPPED, OpenCLIP


@register("clip-t")
class CLIPTextReward(ModelReward):
    """CLIP-T: the cosine of image and prompt, in [-1, 1]; or CLIPScore, 2.5 max(cosine, 0), in [0, 2.5].

    Images go through CLIP's preprocessing: shorter side to 224 (bicubic, antialias), centre crop.

    Args:
        pretrained: the weights, always to be named: a tag of open_clip such as "openai" (fetched if it is not in its
            cache), the path of a state dict, or None for random weights (for tests).
        model: an architecture of open_clip. OpenAI's weights need one whose name ends in "-quickgelu"; that is checked
            for a tag, and cannot be for a path.
        clip_score: give CLIPScore.
        template: what the model reads, "{}" being the prompt; "{}" by default, "A photo depicts {}" for CLIPScore.
        batch_size, device: as `ModelReward`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: a model or weights that are unknown or do not fit each other; a template without "{}".

    Source: CLIP (arXiv 2103.00020), CLIPScore (arXiv 2104.08718), DreamBench (arXiv 2208.12242).
    """

    preprocessing = CROPPED
    scores = "-1 to 1"

    def __init__(
        self,
        *,
        pretrained: str | Path | None,
        model: str = "ViT-B-32-quickgelu",
        clip_score: bool = False,
        template: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        self.template = ("A photo depicts {}" if clip_score else "{}") if template is None else template
        if "{}" not in self.template:
            raise ValueError(f"CLIPTextReward: template: expected '{{}}' in it for the prompt, got {template!r}")
        self.clip_score = clip_score
        self.clip = OpenCLIP(type(self).__name__, model, pretrained, batch_size)

    @property
    def description(self) -> Description:
        own = super().description
        return own._replace(range="0 to 2.5") if self.clip_score else own

    def networks(self) -> dict[str, nn.Module]:
        return {self.clip.name: self.clip.model}

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        self.check_prompts(images, prompts)
        texts = [self.template.replace("{}", prompt) for prompt in prompts]
        cosine = (self.clip.images(images) * self.clip.texts(texts, images.device)).sum(-1)
        return 2.5 * cosine.clamp(min=0) if self.clip_score else cosine


@register("clip-i")
class CLIPImageReward(ReferenceReward):
    """CLIP-I: the mean cosine of an image with its references, in [-1, 1].

    References are one (B, 3, H, W) or several (B, R, 3, H, W) to each image. Copying a reference maximises it.

    Args:
        pretrained: as `CLIPTextReward`.
        model: as `CLIPTextReward`.
        batch_size, device: as `ModelReward`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: a model or weights that are unknown or do not fit each other; when called, no references.

    Source: DreamBench (arXiv 2208.12242).
    """

    preprocessing = CROPPED
    scores = "-1 to 1; 1 for a copy of a reference"

    def __init__(
        self,
        *,
        pretrained: str | Path | None,
        model: str = "ViT-B-32-quickgelu",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        self.clip = OpenCLIP(type(self).__name__, model, pretrained, batch_size)

    def networks(self) -> dict[str, nn.Module]:
        return {self.clip.name: self.clip.model}

    def features(self, images: Tensor) -> Tensor:
        return self.clip.images(images)
