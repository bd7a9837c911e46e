"""What commands do with an Infinity: load and train it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvar.cli.common import device_of_process, load_encoder, load_saved
from fastvar.evaluation import GUIDED, draw
from fastvar.models import BSQTokenizer, Infinity, InfinityConfig, TextEncoder, load_infinity
from fastvar.models.pretrained import CONFIG_NAME, saved_class
from fastvar.random import derive
from fastvar.schedule import ScaleSchedule, infinity_ratios, infinity_schedule
from fastvar.training import InfinityTask, TrainResult, train

if TYPE_CHECKING:
    from fastvar.cli.models import Train

PUBLIC_ENCODER = "google/flan-t5-xl"
_SHOWN = 8  # texts of a picture


def is_infinity(model: Path) -> bool:
    """Whether a folder keeps an Infinity, or there may be weights of a public one: no folder of one of our models."""
    for place in (model, model / "model"):
        if (place / CONFIG_NAME).is_file():
            return saved_class(place / CONFIG_NAME) is Infinity
    return model.is_file() or (model.is_dir() and any(model.glob("*.index.json")))


def load(option: str, model: Path, tokenizer: Path | None, schedule: ScaleSchedule | None = None) -> Infinity:
    """An Infinity with its tokenizer: our folder of it, or public weights of both.

    Args:
        option: the model's, as it opens messages.
        model, tokenizer: paths; the tokenizer's only if the model was not saved with it.
        schedule: its grids, and the tokenizer's, if they are not to be its own.

    Raises:
        ValueError, OSError: they cannot be loaded, or there is no tokenizer.
    """
    if any((place / CONFIG_NAME).is_file() for place in (model, model / "model")):
        net = load_saved(option, Infinity, model)
        if tokenizer is None and not net.has_tokenizer:
            raise ValueError(f"{option}: expected an Infinity that was saved with its tokenizer, got {model}")
        own = net.tokenizer if tokenizer is None else load_saved("tokenizer", BSQTokenizer, tokenizer)
        for part in (net, own):  # weights of both fit any grids
            _set_grids(part, schedule or net.schedule)
        net.tokenizer = own
        return net
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected the file of the public tokenizer that goes with {model}, got none")
    net, _ = load_infinity(model, tokenizer, grids=schedule)
    return net


def _set_grids(model: Infinity | BSQTokenizer, schedule: ScaleSchedule) -> None:
    """Give a model other grids; its config has them too, so that what is saved names them."""
    model.config = replace(model.config, grids=schedule.grids)
    model.schedule = model.config.schedule


def encoder_of(name: str, config: InfinityConfig | None, device: torch.device) -> TextEncoder:
    """The text encoder of a name; without one that of a model.

    Raises:
        ValueError: neither says one.
    """
    name = name or (config.text_encoder if config is not None else "")
    if not name:
        raise ValueError(
            "text_encoder: expected a name, as the model has none: characters, a folder of fastvar encode-text, or a "
            f"T5; {PUBLIC_ENCODER} for the public models"
        )
    longest = config.text_length if config is not None else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_encoder(name, max_length=longest, dtype=dtype, device=device)


def load_with_encoder(
    model: Path,
    tokenizer: Path | None,
    text_encoder: str,
    device: torch.device,
    schedule: ScaleSchedule | None = None,
) -> Infinity:
    """An Infinity as `load` finds it, with the text encoder that `encoder_of` finds; only that is on the device."""
    net = load("model", model, tokenizer, schedule)
    encoder = encoder_of(text_encoder, net.config, device)
    net.config, net.text_encoder = replace(net.config, text_encoder=encoder.name), encoder
    return net


def train_infinity(options: Train) -> TrainResult[Infinity]:
    """Train an Infinity as `fastvar train --task infinity` is asked to."""
    device, budget = torch.device(device_of_process(options.device)), options.budget
    if options.subject != "none" and not options.data.has_references:
        data = options.data.data
        raise ValueError(f"train: subject: expected none with the task infinity and {data}, which has no references")
    schedules = [infinity_schedule(budget, ratio) for ratio in infinity_ratios()] if budget else None
    own = infinity_schedule(budget) if budget else None
    start = None if options.start is None else load("start", options.start, options.tokenizer, own)
    config = None if start is None else start.config
    encoder = encoder_of(options.text_encoder, config, device)
    torch.manual_seed(derive(options.train.seed, "weights"))
    if start is None:
        tokenizer = load_saved("tokenizer", BSQTokenizer, options.tokenizer)
        _set_grids(tokenizer, own or tokenizer.schedule)
        net = _new(options, tokenizer, encoder)
    else:
        net = start.float()  # AdamW needs it
        net.config = replace(net.config, text_encoder=encoder.name)
        net.text_encoder = encoder
        kind = (options.subject, options.subject_own_tokens)
        if options.subject != "none" and kind != (net.config.subject, net.config.subject_own_tokens):
            net = net.add_subject(options.subject, own_tokens=options.subject_own_tokens)
    net.gradient_checkpointing = options.gradient_checkpointing
    sizes = [net.tokenizer.config.image_size_of(schedule) for schedule in schedules or [net.schedule]]
    dataset = options.data.load_with_texts(sizes, seed=options.train.seed)
    texts = [dataset[i]["text"] for i in range(min(_SHOWN, len(dataset)))]

    def picture(model: Infinity) -> Any:
        from fastvar.pictures import image_grid

        return image_grid(draw(model, texts, GUIDED), _SHOWN)

    task = InfinityTask(net, picture, schedules=schedules, flip_strength=options.flip_strength)
    return train(task, dataset, options.train, options.output)


def _new(options: Train, tokenizer: BSQTokenizer, encoder: TextEncoder) -> Infinity:
    config = InfinityConfig(
        grids=tokenizer.config.grids,
        depth=options.depth,
        embed_dim=options.width,
        num_heads=options.heads,
        bits=tokenizer.config.bits,
        text_channels=encoder.channels,
        text_length=encoder.max_length,
        text_encoder=encoder.name,
        pool_heads=options.heads,
        gate_init=options.gate_init,
        subject=options.subject,
        subject_own_tokens=options.subject_own_tokens,
    )
    return Infinity(config, tokenizer, encoder)
