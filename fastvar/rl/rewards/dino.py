"""The reward by DINO: likeness of an image to reference images, finer on the subject's identity than CLIP's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fastvar.rl.rewards.base import register
from fastvar.rl.rewards.models import ReferenceReward, freeze, load_weights, require, unit_features, weights_name
from fastvar.rl.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD, crop_square


@register("dino")
class DINOReward(ReferenceReward):
    """DINO: the mean cosine of the class token (384 numbers) of an image with its references', in [-1, 1].

    Papers differ in the preprocessing; here the shorter side becomes 248 (bicubic, antialias), of which the central 224
    are seen, with ImageNet's statistics. References are one (B, 3, H, W) or several (B, R, 3, H, W) to each image.
    Copying a reference maximises it.

    Args:
        pretrained: the weights, always to be named: "dino", which timm fetches if it is not in its cache, the path of a
            state dict, or None for random weights (for tests).
        model: an architecture of timm, for images of 224, that `pretrained` is a tag of.
        batch_size, device: as `ModelReward`.

    Raises:
        ImportError: timm is not installed.
        ValueError: a model or weights that are unknown or do not fit each other; when called, no references.

    Source: DINO (arXiv 2104.14294), DreamBench (arXiv 2208.12242).
    """

    preprocessing = (
        "the shorter side becomes 248 (bicubic, antialias), the central 224 are cut out, ImageNet's statistics"
    )
    scores = "-1 to 1; 1 for a copy of a reference"

    def __init__(
        self,
        *,
        pretrained: str | Path | None,
        model: str = "vit_small_patch16_224",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        timm = require("timm")
        if not timm.is_model(model) or "." in model:
            raise ValueError(f"DINOReward: model: expected an architecture of timm without a tag, got {model!r}")
        tagged = f"{model}.{pretrained}"
        known = pretrained is not None and tagged in timm.list_pretrained(f"{model}.*")
        if pretrained is not None and not known and not Path(pretrained).is_file():
            tags = [name.split(".")[1] for name in timm.list_pretrained(f"{model}.*")]
            raise ValueError(f"DINOReward: pretrained: expected a file or one of {tags}, got {str(pretrained)!r}")
        # num_classes=0 leaves the class token after the last norm.
        network = timm.create_model(tagged if known else model, pretrained=known, num_classes=0)
        if pretrained is not None and not known:
            load_weights(network, pretrained, "DINOReward: pretrained")
        self.model: nn.Module = freeze(network)
        self._name = f"timm {model}, {weights_name(pretrained)}"

    def networks(self) -> dict[str, nn.Module]:
        return {self._name: self.model}

    def features(self, images: Tensor) -> Tensor:
        def encode(chunk: Tensor) -> Tensor:
            return self.model(crop_square(chunk, 224, resize=248, mean=IMAGENET_MEAN, std=IMAGENET_STD))

        return unit_features(self.model, images, self.batch_size, encode)
