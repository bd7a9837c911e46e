"""The CLIP models of open_clip as the rewards use them: unit features of images and of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastvar.rl.rewards.models import freeze, require, unit_features, weights_name
from fastvar.rl.rewards.preprocessing import crop_square
from fastvar.weights import reason

_REMEMBERED = 4096  # texts whose features are kept; at most 16 MB
CROPPED = "the shorter side becomes the model's (bicubic, antialias), the centre is cut out, the model's statistics"
# Loaded once for all rewards that use the same weights, for as long as one does.
_NETWORKS: WeakValueDictionary[str, Any] = WeakValueDictionary()


class OpenCLIP:
    """A frozen CLIP model, its tokenizer and its preprocessing.

    Args:
        owner: the reward that it is for, as it opens messages.
        name: an architecture out of `open_clip.list_models()`.
        pretrained: a tag out of `open_clip.list_pretrained_tags_by_model(name)`, which open_clip fetches if it is not
            in its cache; the path of a state dict; or None for random weights.
        batch_size: images or texts that go through the model at once.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: an unknown architecture; weights that are neither a tag nor a file, or do not fit; weights trained
            with QuickGELU for an architecture without it, which would score wrongly without a word; a model that does
            not see the shorter side resized and the centre cropped, as CLIP does.
    """

    def __init__(self, owner: str, name: str, pretrained: str | Path | None, batch_size: int) -> None:
        open_clip = require("open_clip")
        configuration = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if configuration is None:
            raise ValueError(f"{owner}: model: expected an architecture of open_clip.list_models(), got {name!r}")
        tag = open_clip.get_pretrained_cfg(name, str(pretrained)) if pretrained is not None else {}
        if tag.get("quick_gelu", False) and not configuration.get("quick_gelu", False):
            raise ValueError(
                f"{owner}: model: expected {name + '-quickgelu'!r}, got {name!r}: the weights {pretrained!r} were "
                f"trained with QuickGELU and score wrongly without it"
            )
        if pretrained is not None and not tag and not Path(pretrained).is_file():
            known = open_clip.list_pretrained_tags_by_model(name)
            raise ValueError(f"{owner}: pretrained: expected a file or one of {known}, got {str(pretrained)!r}")
        self.name = f"open_clip {name}, {weights_name(pretrained)}"
        model = _NETWORKS.get(self.name) if pretrained is not None else None
        try:
            if model is None:
                model = open_clip.create_model(
                    name, pretrained=None if pretrained is None else str(pretrained), pretrained_hf=False
                )
        except Exception as error:
            if pretrained is None or tag:
                raise
            raise ValueError(
                f"{owner}: pretrained: expected a state dict of {name}, got {pretrained}: {reason(error)}"
            ) from error
        if pretrained is not None:
            _NETWORKS[self.name] = model
        seen = model.visual.preprocess_cfg
        sides = (seen["size"],) * 2 if isinstance(seen["size"], int) else tuple(seen["size"])
        if (seen["resize_mode"], seen["interpolation"]) != ("shortest", "bicubic") or sides[0] != sides[1]:
            raise ValueError(f"{owner}: model: expected one with CLIP's preprocessing, got {name!r} with {seen}")
        self.size: int = sides[0]
        self.width: int = configuration["embed_dim"]
        self.mean, self.std = tuple(seen["mean"]), tuple(seen["std"])
        self.batch_size = batch_size
        self.model: nn.Module = freeze(model)
        self.tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        self._texts: dict[str, Tensor] = {}

    def images(self, images: Tensor, prepare: Callable[..., Tensor] = crop_square) -> Tensor:
        """Unit features (B, D) of images (B, 3, H, W) in [0, 1].

        prepare: brings images to the model's size and statistics, called as `crop_square`.
        """

        def encode(chunk: Tensor) -> Tensor:
            return self.model.encode_image(prepare(chunk, self.size, mean=self.mean, std=self.std))  # type: ignore[operator]

        return unit_features(self.model, images, self.batch_size, encode)

    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Unit features (B, D) of texts, on a device. Each text is computed once: a rollout repeats its prompts."""
        if len(self._texts) > _REMEMBERED:
            self._texts.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            tokens = self.tokenizer(new).to(device)
            features = unit_features(self.model, tokens, self.batch_size, self.model.encode_text)  # type: ignore[arg-type]
            self._texts.update(zip(new, features.cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts]).to(device)
