"""Training of an Infinity: the cross-entropy of a tokenizer's bits under teacher forcing with self-correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import nn

from fastvar.models import Infinity, bitwise_loss, scale_weights, self_correction
from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from PIL.Image import Image


class InfinityTask:
    """Predict each scale's bits from the coarser ones, some of which are flipped, and the text.

    A batch holds `image` (B, 3, H, W) in [-1, 1], all of the size of one of the schedules, and `text`, B texts; for a
    model with a subject prefix `reference` of the images' size, too. Texts and subjects are dropped at the rates of the
    model's config. What is drawn at random, flips and what is dropped, comes from torch's
    state, which checkpoints keep.

    Args:
        model: an Infinity with its tokenizer, which stays frozen, and its text encoder attached.
        draw: called with the averaged model for a picture of samples.
        schedules: the grids to train on, of images of different sizes; the model's own by default.
        flip_strength: the largest probability of a flipped bit of self-correction; 0 for no flips.
        flip_scales: how many of the first scales have flips.
        weighted: weigh scales as `fastvar.models.scale_weights` does, instead of all tokens alike.

    Raises:
        ValueError: schedules that do not fit the model, or two for images of one size; a text encoder of other channels
            or longer texts; a strength outside 0 to 1.
        RuntimeError: no tokenizer or no text encoder.
    """

    name = "infinity"

    def __init__(
        self,
        model: Infinity,
        draw: Callable[[Infinity], Image] | None = None,
        *,
        schedules: Sequence[ScaleSchedule] | None = None,
        flip_strength: float = 0.3,
        flip_scales: int = 13,
        weighted: bool = True,
    ) -> None:
        # raises for one that makes no sense; torch's state is left alone
        self_correction(1, strength=flip_strength, generator=torch.Generator())
        config, tokenizer, encoder = model.config, model.tokenizer, model.text_encoder
        if encoder.channels != config.text_channels or encoder.max_length > config.text_length:
            raise ValueError(
                f"InfinityTask: model: expected a text encoder of {config.text_channels} channels and at most "
                f"{config.text_length} rows, got {encoder.name} of {encoder.channels} and {encoder.max_length}"
            )
        chosen = [config.check_schedule(schedule) for schedule in schedules or [model.schedule]]
        self.schedules = {tokenizer.config.image_size_of(schedule): schedule for schedule in chosen}
        if len(self.schedules) != len(chosen):
            raise ValueError("InfinityTask: schedules: expected images of different sizes, got two of one size")
        self.model, self.draw = model, draw
        self.flip_strength, self.flip_scales, self.weighted = flip_strength, flip_scales, weighted
        weights = (tensor.detach().cpu().contiguous() for tensor in tokenizer.encoder.state_dict().values())
        self.identity: dict[str, Any] = {
            "tokenizer": {
                "encoder": crc32(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in weights)),
                **asdict(tokenizer.config),
            },
            "text_encoder": {
                "name": encoder.name,
                "max_length": encoder.max_length,
                "dtype": str(encoder.dtype).removeprefix("torch."),
            },
            "schedules": [str(schedule) for schedule in chosen],
            "loss": {"flip_strength": flip_strength, "flip_scales": flip_scales, "weighted": weighted},
        }
        tokenizer.requires_grad_(False).eval()

    def check_data(self, dataset: Any) -> None:
        """Raise a ValueError if a data set that names its sizes or texts has some that cannot be trained on, or has no
        references for a model with a subject prefix."""
        other = [size for size in getattr(dataset, "sizes", ()) if size not in self.schedules]
        if other:
            raise ValueError(f"InfinityTask: data: expected images of {sorted(self.schedules)} pixels, got {other}")
        if self.model.config.subject != "none" and "reference" not in dataset[0]:
            raise ValueError("InfinityTask: data: expected references, as the model has a subject prefix, got none")
        check = getattr(self.model.text_encoder, "check", None)
        if check is not None and hasattr(dataset, "texts"):
            check(dataset.texts)

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net = self.model
        images = batch["image"].to(net.device, non_blocking=True)
        schedule = self.schedules.get((images.shape[2], images.shape[3]))
        if schedule is None:
            raise ValueError(
                f"InfinityTask: data: expected images of {sorted(self.schedules)} pixels, got {tuple(images.shape[2:])}"
            )
        quantized = net.tokenizer.quantize(
            images,
            flip_probability=self_correction(len(schedule), strength=self.flip_strength, scales=self.flip_scales),
            seed=int(torch.randint(2**31, ())),
            schedule=schedule,
        )
        subject = None
        if net.config.subject != "none":
            reference = net.tokenizer.encode(batch["reference"].to(net.device, non_blocking=True), schedule=schedule)
            subject = net.pyramid(reference, schedule=schedule)
        logits = model(net.features(batch["text"]), quantized.teacher_forcing, subject=subject, schedule=schedule)
        weights = scale_weights(schedule, logits.device) if self.weighted else None
        right = ((logits.detach() > 0) == quantized.bits).float()
        return bitwise_loss(logits, quantized.bits, weights), {
            "bits_right": right.mean(),
            "bits_right_coarsest": right[:, : schedule.ends[0]].mean(),
            "bits_right_finest": right[:, schedule.starts[-1] :].mean(),
        }

    def picture(self, model: Infinity) -> Image | None:
        return None if self.draw is None else self.draw(model)
