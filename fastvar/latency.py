"""How long a call takes that draws a batch of images: one of our models beside a pipeline of diffusers."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fastvar.data.metrics import mean_interval, ratio_interval
from fastvar.installation import install_command
from fastvar.models import Model, SamplingOptions

WARM_UP = 3  # our models run without a CUDA graph, capture one, replay it
Draw = Callable[[], torch.Tensor]  # answers images (B, 3, H, W) on the CPU


class Pipeline:
    """A diffusers pipeline of a folder, as it was saved there: with its own scheduler, without a safety checker.

    Args:
        folder: that `save_pretrained` of the pipeline wrote, or a copy of one from the Hugging Face hub.
        dtype: of its weights.
        device: where it runs.
        options: what it is called with besides prompts and generator, such as num_inference_steps, guidance_scale,
            height and width; its own defaults for the others.

    Raises:
        FileNotFoundError: no pipeline in that folder.
        ImportError: diffusers is not installed; says how to install it.
        ValueError: an option that it has not, or that is not the caller's to set.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, options: Mapping[str, Any]) -> None:
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"latency: diffusers: expected a folder with model_index.json, got {folder}")
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(f"latency: needs diffusers: {install_command('diffusion')}") from error
        loaded = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        self.pipeline: Any = loaded.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.without_safety_checker = getattr(self.pipeline, "safety_checker", None) is not None
        if self.without_safety_checker:
            self.pipeline.safety_checker = None
        self.folder, self.device, self.version = folder, device, diffusers.__version__
        parameters = inspect.signature(self.pipeline.__call__).parameters
        self.draws_classes = "class_labels" in parameters
        own = ("class_labels", "prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")
        free = {name: value.default for name, value in parameters.items() if name not in own}
        unknown = sorted(set(options) - set(free))
        if unknown:
            raise ValueError(f"latency: pipeline_options: expected some of {', '.join(free)}, got {', '.join(unknown)}")
        plain = {name: value for name, value in free.items() if isinstance(value, bool | int | float | str)}
        self.given = dict(options)
        self.options = {**plain, **options}

    def call(self, prompts: Sequence[Any], seed: int) -> Draw:
        """What draws an image of each class or text."""
        name = "class_labels" if self.draws_classes else "prompt"

        def draw() -> torch.Tensor:
            generator = torch.Generator(self.device).manual_seed(seed)
            # arrays on the host: every kind of pipeline has them, and what arrives there has been waited for
            out = self.pipeline(**{name: list(prompts)}, generator=generator, output_type="np", **self.given)
            return torch.from_numpy(out.images).movedim(-1, 1)

        return draw

    def describe(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {
            "model": str(self.folder),
            "class": type(self.pipeline).__name__,
            "diffusers": self.version,
            "scheduler": type(getattr(self.pipeline, "scheduler", None)).__name__,
            "parts": _parts(self.pipeline.components),
            "options": self.options,
            "without_safety_checker": self.without_safety_checker,
        }


def our_call(model: Model, prompts: Any, options: SamplingOptions, seed: int) -> Draw:
    """What draws an image of each class or text with a model in evaluation mode, with the reading of texts."""

    def draw() -> torch.Tensor:
        images = model.generate(prompts, seed=seed, **options.arguments(model)).images
        assert images is not None  # they were decoded
        return images.cpu()

    return draw


def describe_model(model: Model, folder: Path, options: SamplingOptions) -> dict[str, Any]:
    """What was measured, ready for JSON."""
    parts: dict[str, Any] = {"transformer": model, "tokenizer": model.tokenizer}
    encoder = getattr(model, "text_encoder", None)
    if encoder is not None:
        parts["text_encoder"] = getattr(encoder, "model", None)
    return {
        "model": str(folder),
        "class": type(model).__name__,
        "parts": _parts(parts),
        "options": options.arguments(model),
        **({} if encoder is None else {"text_encoder": encoder.name}),
    }


def _parts(parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each network the number of parameters and the dtypes that they have."""
    networks = {name: list(part.parameters()) for name, part in parts.items() if isinstance(part, nn.Module)}
    return {
        name: {
            "parameters": sum(value.numel() for value in values),
            "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in values}),
        }
        for name, values in networks.items()
    }


def measure(
    calls: Mapping[str, Draw], images: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Seconds of each call, from the start to images on the CPU: in every round each is called once, in an order that
    turns, so that what else the machine does meets all of them.

    Args:
        calls: by name.
        images: that each has to answer.
        rounds: at least 2, after `WARM_UP` that do not count.
        clock: seconds that have passed.

    Returns:
        By name the size of the images (H, W), the mean of the seconds with its 95 % interval, and those of each round.

    Raises:
        ValueError: another number of images.
    """
    sizes: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-WARM_UP, rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            start = clock()
            drawn = calls[name]()
            took = clock() - start
            if turn >= 0:
                seconds[name].append(took)
            if drawn.ndim != 4 or len(drawn) != images:
                raise ValueError(f"latency: {name}: expected {images} images, got shape {list(drawn.shape)}")
            sizes[name] = list(drawn.shape[2:])
    return {
        name: {"image_size": sizes[name], "seconds": fmean(took), "seconds_95": mean_interval(took), "rounds": took}
        for name, took in seconds.items()
    }


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as long theirs took as ours, with its 95 % interval over rounds."""
    return {"ratio": sum(theirs) / sum(ours), "ratio_95": ratio_interval(theirs, ours)}
