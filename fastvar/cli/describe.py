"""What a file or a folder is: models, runs, weights, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastvar.data.folder import EXTENSIONS, ImageFolder
from fastvar.files import read_json_object, read_text
from fastvar.models import BSQTokenizerConfig, InfinityConfig
from fastvar.models.encoded_texts import ABOUT, EncodedTexts
from fastvar.models.infinity_checkpoints import public_infinity_config
from fastvar.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, load_config, saved_class, with_article
from fastvar.models.public_state import read_state
from fastvar.models.with_tokenizer import TOKENIZER_FOLDER, WithTokenizer
from fastvar.pictures import read_picture
from fastvar.training.checkpoints import saved_steps
from fastvar.training.log import read_metrics
from fastvar.weights import read_weights, without_wrappers

_OWNER = "info: path"


def describe(path: Path) -> Iterator[str]:
    """Lines that say what there is.

    Raises:
        FileNotFoundError: nothing.
        ValueError: a damaged file; names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{_OWNER}: expected a file or a folder, got {path}, which is none")
    if path.is_dir():
        yield from _folder(path)
    elif path.name == CONFIG_NAME:
        yield from _folder(path.parent)
    elif path.name == "metrics.jsonl":
        yield from _metrics(path)
    elif path.suffix == ".json":
        yield f"{path}: JSON with {', '.join(read_json_object(path, _OWNER)) or 'nothing'}"
    elif path.suffix.lower() in EXTENSIONS:
        width, height = read_picture(path, _OWNER).size
        yield f"{path}: a picture of {height} x {width} pixels"
    elif path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
        yield from _weights(path)
    else:
        yield f"{path}: a text of {len(read_text(path, _OWNER).splitlines())} lines"


def _folder(path: Path) -> Iterator[str]:
    if (path / CONFIG_NAME).is_file():
        yield from _model(path)
    elif (path / "settings.json").is_file():
        yield from _run(path)
    elif re.fullmatch(r"step-\d{8}", path.name):
        yield f"{path}: a checkpoint of the run in {path.parent.parent}; the same command goes on from it"
    elif list(path.glob("*.index.json")):
        yield from _states(path, read_state(path, _OWNER, "trainer", "gpt_fsdp", mapped=True))
    elif (path / ABOUT).is_file():
        texts = EncodedTexts(path)
        yield f"{path}: features of {len(texts)} texts, {texts.channels} channels of {texts.name}"
    else:
        try:
            images = ImageFolder(path, size=1, transform=torch.as_tensor)
        except ValueError as error:
            yield f"{path}: a folder without a model, a run or a data set ({error})"
            return
        yield f"{path}: a data set of {len(images)} images{_classes(images.classes)}"


def _model(path: Path) -> Iterator[str]:
    kind = saved_class(path / CONFIG_NAME)
    if kind is None:
        yield f"{path}: a model that is none of fastvar's"
        return
    config = load_config(kind.config_class, path / CONFIG_NAME)
    if isinstance(config, InfinityConfig | BSQTokenizerConfig):
        codes = f"{config.bits} bits a token"
    else:
        codes = f"{config.vocab_size} codes of {config.code_channels} channels"
    yield f"{path}: {with_article(kind.__name__)}, grids {config.schedule}, {codes}"
    if issubclass(kind, WithTokenizer):
        shape = f"depth {config.depth}, width {config.embed_dim}, {config.num_heads} heads"
        yield f"  {shape}, subject {config.subject}{' of its own tokens' if config.subject_own_tokens else ''}"
        if isinstance(config, InfinityConfig):
            yield f"  {_texts(config)}"
        elif config.text_length:
            yield f"  condition: texts of up to {config.text_length} characters out of {config.alphabet!r}"
        else:
            yield f"  condition: {config.num_classes} classes{_classes(config.class_names)}"
        own = path / TOKENIZER_FOLDER
        yield f"  tokenizer: {own if own.is_dir() else 'none, it cannot sample'}"
    else:
        yield "  images of {} x {} pixels".format(*config.image_size)
    if (path / WEIGHTS_NAME).is_file():
        yield f"  {_counted(read_weights(path / WEIGHTS_NAME, _OWNER))}"
    else:
        yield f"  no weights: {WEIGHTS_NAME} is missing"


def _run(path: Path) -> Iterator[str]:
    settings = read_json_object(path / "settings.json", _OWNER)
    yield f"{path}: the folder of a run ({'reinforcement learning' if 'rl' in settings else 'training'})"
    yield from _metrics(path / "metrics.jsonl")
    steps = saved_steps(path)
    yield f"  checkpoints: {', '.join(map(str, steps)) or 'none'}"
    models = [path / name for name in ("model", "best") if (path / name / CONFIG_NAME).is_file()]
    if not models:
        yield "  no model yet: the same command goes on with the run"
    for model in models:
        yield from _model(model)


def _metrics(path: Path) -> Iterator[str]:
    lines = read_metrics(path)
    last = ", ".join(f"{name} {value:.4g}" for name, value in lines[-1].items()) if lines else "none"
    yield f"  {len(lines)} lines of metrics, the last: {last}"


def _weights(path: Path) -> Iterator[str]:
    yield from _states(path, read_weights(path, _OWNER, mapped=True))


def _states(path: Path, state: Any) -> Iterator[str]:
    """What a file's or a folder's tensors are, without reading them."""
    nested = state.get("trainer") if isinstance(state, Mapping) else None
    if isinstance(state, Mapping) and isinstance(state.get("vae"), Mapping):
        nested = {"vae": state["vae"]}
    states = nested if isinstance(nested, Mapping) else {"": state}
    for name, tensors in states.items():
        tensors = without_wrappers(tensors)[0] if isinstance(tensors, Mapping) else {}
        tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
        kind = "a state dict"
        if "cfg_uncond" in tensors:
            kind = "a public Infinity transformer, for fastvar.models.load_infinity"
        elif "encoder.conv_in.conv.weight" in tensors:
            kind = "a public Infinity tokenizer, for fastvar.models.load_infinity"
        elif "word_embed.weight" in tensors:
            kind = "a public VAR transformer, for fastvar.models.load_var"
        elif "quantize.embedding.weight" in tensors:
            kind = "a public VAR tokenizer, for fastvar.models.load_var"
        where = f" under {name}" if name else ""
        if tensors:
            yield f"{path}: {kind}{where}; {_counted(tensors)}"
            with suppress(ValueError):  # what is no Infinity's, or not all of it
                config = public_infinity_config(tensors, str(path))
                shape = f"depth {config.depth}, width {config.embed_dim}, {config.num_heads} heads"
                yield f"  {shape}, {config.bits} bits a token"
                yield f"  {_texts(config)}"
        else:
            yield f"{path}: no tensors{where}"


def _texts(config: InfinityConfig) -> str:
    encoder = f" ({config.text_encoder})" if config.text_encoder else ""
    return f"condition: texts of up to {config.text_length} rows of {config.text_channels} channels{encoder}"


def _counted(tensors: Mapping[str, Any]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters in {', '.join(dtypes)}"


def _classes(names: Any) -> str:
    names = [name for name in names if name]
    return f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
