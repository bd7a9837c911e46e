"""What rewards by a frozen model have in common: packages, checkpoints, checks, devices, chunks, unit features."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastvar.installation import install_command
from fastvar.pictures import check_images
from fastvar.rl.rewards.base import Description, Reward
from fastvar.weights import read_weights, reason, without_wrappers


def require(package: str) -> ModuleType:
    """Import a package of the extra `rewards`, only now that it is needed.

    Raises:
        ImportError: it is not there; names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed: {install_command('rewards')} ({error})") from error


def weights_name(pretrained: str | Path | None) -> str:
    """Weights as a description has them: a tag, "random", or a path with the size and the time of its file (of a folder
    `model.safetensors`), by which scores of other weights at the same path are known."""
    if pretrained is None:
        return "random"
    path = Path(pretrained)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        return str(pretrained)
    stat = path.stat()
    changed = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()
    return f"{pretrained} ({stat.st_size} bytes, of {changed})"


def memory_of(*networks: nn.Module) -> int:
    """Bytes of the weights of networks. A state dict of quantised layers has more than tensors: what is packed there is
    not counted."""
    values = [value for network in networks for value in network.state_dict().values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def freeze(model: nn.Module) -> nn.Module:
    """The model for scoring only: eval mode, float32, no parameter wants a gradient."""
    return model.float().eval().requires_grad_(False)


def load_weights(model: nn.Module, path: str | Path, owner: str) -> None:
    """Fill a model from a state dict on disk, safetensors or torch.save; every key has to fit.

    The file is loaded without running code from it, on the CPU.

    Args:
        owner: "class: argument", as it opens the message.

    Raises:
        ValueError: no such file, a file that is no state dict, or one of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"{owner}: expected a checkpoint file, got {str(path)!r}, which is none")
    state = read_weights(path, owner)
    try:
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        model.load_state_dict(without_wrappers(state)[0])
    except Exception as error:  # each way of being something else raises another one
        expected = f"a state dict of {type(model).__name__}"
        raise ValueError(f"{owner}: expected {expected}, got {path}: {reason(error)}") from error


class ModelReward:
    """Base of the rewards by a frozen model; a subclass implements `score`.

    The model computes in float32 whatever autocast says and takes `batch_size` images at a time. Scores carry no
    gradient and are decided everywhere in the image: no mask. A subclass has `networks`, and says in words what its
    `preprocessing` is and in what range its `scores` are.

    Args:
        batch_size: images that go through the model at once.
        device: where the model is, such as "cuda:1"; by default it follows the images from device to device.

    Raises:
        ValueError: a batch size below 1.
        RuntimeError: no such device (by torch).
    """

    preprocessing: ClassVar[str]
    scores: ClassVar[str]

    def __init__(self, batch_size: int, device: str | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}: batch_size: expected at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._device = None if device is None else torch.device(device)  # it decides no score: no run's setting

    @property
    def description(self) -> Description:
        """Which weights, what is done with images, which scores, how much memory."""
        networks = self.networks()
        return Description(" and ".join(networks), self.preprocessing, self.scores, memory_of(*networks.values()))

    def networks(self) -> dict[str, nn.Module]:
        """The networks by what their weights are."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str] = (), references: Tensor | None = None) -> Reward:
        """Score images (B, 3, H, W) in [0, 1]; arguments as `RewardFunction`. Scores are (B,) float32.

        Raises:
            ValueError: images or references of another shape or range; too few prompts or references where needed.
        """
        check_images(images, f"{type(self).__name__}: images")
        if not len(images):
            return Reward(torch.zeros(0, device=images.device))
        scores = self.frozen(lambda moved: self.score(moved, prompts, references), images)
        return Reward(scores.to(images.device))

    @torch.no_grad()
    def frozen(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """A function of images (B, 3, H, W) in float32 on the model's device, without gradients and autocast."""
        images = images.to(self._device or images.device, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            return function(images)

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        """The scores (B,) float32 of at least one image; called without gradients and without autocast."""
        raise NotImplementedError

    def check_prompts(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Raise ValueError unless there is a prompt for each image."""
        if len(prompts) != len(images):
            raise ValueError(f"{type(self).__name__}: prompts: expected {len(images)}, got {len(prompts)}")


class ReferenceReward(ModelReward):
    """Base of the rewards by likeness to references: the mean cosine of features over all pairs, in [-1, 1].

    References are one (B, 3, H, W) or several (B, R, 3, H, W) to each image, in [0, 1], of any size.
    """

    def features(self, images: Tensor) -> Tensor:
        """Unit features (N, D) of images (N, 3, H, W); called as `score`."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Unit features (N, D) float32 of images (N, 3, H, W) in [0, 1], whose products are the cosines.

        Raises:
            ValueError: images of another shape or range.
        """
        check_images(images, f"{type(self).__name__}: images")
        return self.frozen(self.features, images)

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        name = f"{type(self).__name__}: references"
        if references is None:
            raise ValueError(f"{name}: expected (B, 3, H, W), got None: this reward compares with reference images")
        check_images(references, name, dimensions=5 if references.dim() == 5 else 4)
        if len(references) != len(images) or not references.numel():
            raise ValueError(f"{name}: expected some for each of {len(images)} images, got {tuple(references.shape)}")
        references = references.to(images.device).float()
        goals = self.features(references.flatten(0, -4)).unflatten(0, (len(images), -1))
        return (goals * self.features(images)[:, None]).sum(-1).mean(1)


def unit_features(model: nn.Module, images: Tensor, batch_size: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Features (B, D) of length 1, float32.

    Args:
        model: is brought to the images' device first.
        encode: from a chunk of images to features; prepares the chunk, so that only a chunk is held at full size.
    """
    model.to(images.device)
    chunks = [encode(chunk).float() for chunk in images.split(batch_size)]
    return nn.functional.normalize(torch.cat(chunks), dim=-1)
