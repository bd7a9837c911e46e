"""Objects in images, found by transformers' Mask2Former for the instances of COCO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fastvar.rl.rewards.base import Description
from fastvar.rl.rewards.models import freeze, memory_of, require, weights_name
from fastvar.rl.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD

SHORTER, LONGER, DIVISOR, MOST = 800, 1333, 32, 100
LABELS = {  # as GenEval calls them; six are spelled otherwise in some conversions of COCO's
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch"},
    **{"pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv"},
}


class Found(NamedTuple):
    """An object in an image.

    Attributes:
        box: x0, y0, x1, y1 in pixels, x1 and y1 behind its last ones.
        score: how sure the detector is, in [0, 1].
        mask: (H, W) bool on the CPU; None for all of the box.
    """

    box: tuple[float, float, float, float]
    score: float = 1.0
    mask: Tensor | None = None


Objects = dict[str, list[Found]]  # by label, the surest first


class Detector(Protocol):
    """Finds objects.

    Attributes:
        labels: of what it finds.
    """

    labels: Sequence[str]

    def __call__(self, images: Tensor) -> list[Objects]:
        """The objects of images (B, 3, H, W) in [0, 1]."""


class Mask2Former:
    """Finds up to 100 objects in an image: class and mask with the probability of the class times the mean probability
    within the mask. The shorter side becomes 800 pixels and the longer one at most 1333, as its configuration in
    mmdetection has it; weights of transformers are not that framework's.

    Args:
        pretrained: a name on the Hugging Face hub or a folder as `save_pretrained` writes it.
        sides: what the shorter side becomes, and the longer one at most.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: no such model (by transformers).

    Source: Mask2Former (arXiv 2112.01527).
    """

    def __init__(self, pretrained: str, *, sides: tuple[int, int] = (SHORTER, LONGER)) -> None:
        network = require("transformers").Mask2FormerForUniversalSegmentation.from_pretrained(pretrained)
        self.model: Any = freeze(network)
        self.pretrained, self.sides = pretrained, sides
        names = network.config.id2label
        self.labels: Sequence[str] = [LABELS.get(names[i], names[i]) for i in range(len(names))]

    @property
    def description(self) -> Description:
        """Which weights."""
        does = f"shorter side {self.sides[0]}, longer at most {self.sides[1]} (bilinear), ImageNet's statistics"
        weights = f"Mask2Former of transformers, {weights_name(self.pretrained)}"
        return Description(weights, does, "0 to 1", memory_of(self.model))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Objects]:
        """As `Detector`."""
        height, width = images.shape[-2:]
        scale = min(self.sides[0] / min(height, width), self.sides[1] / max(height, width))
        size = [round(height * scale), round(width * scale)]
        padded = [-(-side // DIVISOR) * DIVISOR for side in size]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.model.to(images.device)
        found = []
        for image in images.float():  # one at a time: masks of 100 queries at full size take memory
            pixels = (interpolate(image[None], size, mode="bilinear", align_corners=False) - mean) / std
            out = self.model(pixel_values=pad(pixels, (0, padded[1] - size[1], 0, padded[0] - size[0])))
            masks = interpolate(out.masks_queries_logits, padded, mode="bilinear", align_corners=False)
            masks = interpolate(masks[..., : size[0], : size[1]], (height, width), mode="bilinear", align_corners=False)
            found.append(self._objects(out.class_queries_logits[0], masks[0]))
        return found

    def _objects(self, classes: Tensor, masks: Tensor) -> Objects:
        """Of logits of classes (queries, labels + 1), the last one no object, and of masks (queries, H, W)."""
        likely = classes.softmax(-1)[:, :-1]
        scores, places = likely.flatten().topk(min(MOST, likely.numel()))
        objects: Objects = {}
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, likely.shape[1])
            mask = masks[query] > 0
            if mask.any():
                sure = score * float(masks[query].sigmoid()[mask].mean())
                objects.setdefault(self.labels[label], []).append(Found(box_of(mask), sure, mask.cpu()))
        return {label: sorted(each, key=lambda one: -one.score) for label, each in objects.items()}


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask (H, W) that is not empty."""
    down, across = (mask.any(axis).nonzero() for axis in (1, 0))
    return float(across[0]), float(down[0]), float(across[-1]) + 1, float(down[-1]) + 1
