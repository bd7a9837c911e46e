"""The command line `fastvar`: thin commands over the library, every option documented in --help."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvar.evaluation import SamplingOptions
from fastvar.training.loop import TrainConfig

if TYPE_CHECKING:
    from fastvar.models import VAR

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str = "handwriting"
    """"handwriting" (scenes of scanned digits, no download) or a folder of images, one subfolder per class."""
    scenes: int = 16000
    """Handwriting: number of scenes."""
    digits: int = 2
    """Handwriting: digits of each number."""
    flip: bool = True
    """Folder: mirror images at random; switch it off for text."""

    def load(self, size: tuple[int, int], *, train: bool, seed: int) -> Any:
        """The data set at an image size (height, width)."""
        from fastvar.data import HandwritingScenes, ImageFolder

        if self.data == "handwriting":
            split = "train" if train else "test"
            return HandwritingScenes(length=self.scenes, size=size, digits=self.digits, split=split, seed=seed)
        return ImageFolder(self.data, size=size, train=train, flip=self.flip)


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a VQ tokenizer."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    grids: str = "1,2,3x4,6x8"
    """Token grids, coarse to fine ("1,2,3x4" are 1x1, 2x2, 3x4), or a preset such as "var-256"."""
    vocab_size: int = 256
    """Entries of the codebook."""
    code_channels: int = 16
    """Channels of a code."""
    channels: int = 16
    """Width of the first convolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Width of each resolution in units of `channels`; images are 2^(count - 1) times the finest grid."""
    blocks_per_level: int = 1
    """Residual blocks of each resolution."""
    norm_groups: int = 8
    """Groups of the group norms; must divide every width."""
    attention: bool = False
    """Attention on the coarsest resolution."""
    chroma_gain: float = 3.5
    """Enlarge colour against grey for the networks and the loss; 1 leaves images as they are."""
    data: Annotated[DataOptions, Flat] = field(default_factory=DataOptions)
    train: Annotated[TrainConfig, Flat] = field(default_factory=lambda: TrainConfig(weight_decay=0.0))

    def run(self) -> None:
        import torch

        from fastvar.models import VQTokenizer, VQTokenizerConfig
        from fastvar.schedule import ScaleSchedule
        from fastvar.training import TokenizerTask, train

        config = VQTokenizerConfig(
            grids=ScaleSchedule.parse(self.grids).grids,
            vocab_size=self.vocab_size,
            code_channels=self.code_channels,
            channels=self.channels,
            channel_multipliers=self.channel_multipliers,
            blocks_per_level=self.blocks_per_level,
            norm_groups=self.norm_groups,
            attention=self.attention,
            chroma_gain=self.chroma_gain,
        )
        dataset = self.data.load(config.image_size, train=True, seed=self.train.seed)
        held_out = self.data.load(config.image_size, train=False, seed=self.train.seed)
        examples = torch.stack([held_out[i]["image"] for i in range(min(8, len(held_out)))])
        torch.manual_seed(self.train.seed)
        result = train(TokenizerTask(VQTokenizer(config), examples), dataset, self.train, self.output)
        print(f"tokenizer: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")


@dataclass(frozen=True)
class Train:
    """Train a VAR on a tokenizer's tokens."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    tokenizer: Path
    """Folder of a trained tokenizer, such as RUN/model of train-tokenizer."""
    start: Path | None = None
    """Folder of a VAR to start from instead of random weights; depth, width and heads are its own."""
    depth: int = 4
    """Number of blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads."""
    subject: str = "none"
    """Prefix of a reference subject: "none", "block_causal" or "bidirectional". Handwriting only."""
    cache_tokens: bool = False
    """Encode the whole data set once, in memory, instead of every batch; images are then not augmented anew."""
    data: Annotated[DataOptions, Flat] = field(default_factory=DataOptions)
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)

    def run(self) -> None:
        import torch

        from fastvar.models import VAR, VARConfig, VQTokenizer
        from fastvar.training import TokenDataset, VARTask, train

        tokenizer = VQTokenizer.from_pretrained(_saved("tokenizer", self.tokenizer))
        dataset = self.data.load(tokenizer.config.image_size, train=True, seed=self.train.seed)
        torch.manual_seed(self.train.seed)
        if self.start is not None:
            model = VAR.from_pretrained(_saved("start", self.start))
            model.tokenizer = tokenizer
            if self.subject not in ("none", model.config.subject):
                model = model.add_subject(self.subject)
        else:
            handwriting = self.data.data == "handwriting"
            model = VAR(
                VARConfig(
                    grids=tokenizer.config.grids,
                    depth=self.depth,
                    embed_dim=self.width,
                    num_heads=self.heads,
                    vocab_size=tokenizer.config.vocab_size,
                    code_channels=tokenizer.config.code_channels,
                    num_classes=0 if handwriting else dataset.num_classes,
                    text_length=self.data.digits if handwriting else 0,
                    subject=self.subject,
                ),
                tokenizer,
            )
        if bool(model.config.text_length) != (self.data.data == "handwriting"):
            raise ValueError(
                "train: start: expected a model with a text condition for handwriting, classes for a folder"
            )
        if model.config.subject != "none" and self.data.data != "handwriting":
            raise ValueError('train: subject: expected "none" for a folder of images, which has no references')
        if self.cache_tokens:
            dataset = TokenDataset(dataset, tokenizer, reference=model.config.subject != "none")
        result = train(VARTask(model, self._picture), dataset, self.train, self.output)
        print(f"var: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")

    def _picture(self, model: VAR) -> Any:
        from fastvar.evaluation import draw, every_number
        from fastvar.training.pictures import image_grid

        config = model.config
        labels: Any = every_number(config.text_length, 32)
        if not config.text_length:
            import torch

            labels = torch.arange(32) % config.num_classes
        return image_grid(draw(model, labels, SamplingOptions()), 8)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained VAR and save them as one PNG."""

    model: Path
    """Folder of the model (save_pretrained), with its tokenizer inside."""
    labels: tuple[str, ...]
    """What to draw: class indices, or texts for a model with a text condition."""
    output: Path = Path("samples.png")
    """The picture; one row per label."""
    count: int = 8
    """Images per label."""
    subject: Path | None = None
    """An image of the reference subject, for a model with a subject prefix."""
    zoom: int = 1
    """Repeat each pixel so many times."""
    options: Annotated[SamplingOptions, Flat] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        import torch

        from fastvar.evaluation import draw
        from fastvar.training.pictures import image_grid, save_picture

        _at_least("count", self.count, 1)
        _at_least("zoom", self.zoom, 1)
        var = load_model(self.model)
        texts = [label for label in self.labels for _ in range(self.count)]
        labels: Any = texts
        if not var.config.text_length:
            classes = [_class_index(label, var.config.num_classes) for label in texts]
            labels = torch.tensor(classes)
        subject = None
        if self.subject is not None:
            image = _read_image(self.subject, var.tokenizer.config.image_size)
            tokens = var.tokenizer.encode(image[None].to(var.device))
            subject = var.tokenizer.pyramid(tokens).expand(len(texts), -1, -1)
        save_picture(
            image_grid(draw(var, labels, self.options, subject=subject), self.count, zoom=self.zoom), self.output
        )
        print(self.output)


@dataclass(frozen=True)
class Evaluate:
    """Let the reader read samples of a handwriting model: word accuracy and NED with 95 % intervals, and for a model
    with a subject prefix how often a sample's digit matches its reference."""

    model: Path
    """Folder of the model (save_pretrained), with its tokenizer inside."""
    samples: int = 400
    """Images to draw."""
    output: Path | None = None
    """Also write the figures to this JSON file."""
    options: Annotated[SamplingOptions, Flat] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from fastvar.data import HandwritingScenes, Reader
        from fastvar.evaluation import evaluate_subject, evaluate_texts, every_number
        from fastvar.files import write_json

        _at_least("samples", self.samples, 2)
        var = load_model(self.model)
        digits = var.config.text_length
        if not digits:
            raise ValueError("evaluate: model: expected one trained on handwriting, with a text condition")
        reader = Reader()
        figures: dict[str, Any] = {}
        if var.config.subject == "none":
            read = evaluate_texts(var, every_number(digits, self.samples), self.options, reader)
        else:
            scenes = HandwritingScenes(
                length=self.samples, size=var.tokenizer.config.image_size, digits=digits, split="test"
            )
            read, match = evaluate_subject(var, scenes, self.options, reader)
            figures["subject_match"] = match.summary()
        figures = {"reading": read.summary(), **figures}
        print(json.dumps(figures, indent=2))
        if self.output is not None:
            write_json(self.output, figures)


@dataclass(frozen=True)
class Info:
    """Show versions, devices and the support matrix."""

    markdown: bool = False
    """Print only the support matrix, as the README has it."""

    def run(self) -> None:
        import torch

        import fastvar

        if self.markdown:
            print(fastvar.support().markdown(), end="")
            return
        print(f"fastvar {fastvar.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
        for name in ("triton", "accelerate", "flash_attn", "xformers", "open_clip", "timm", "transformers"):
            print(f"{name}: {_version(name)}")
        print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        for i in range(torch.cuda.device_count()):
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute {torch.cuda.get_device_capability(i)}")
        if not torch.cuda.device_count():
            print("GPU: none")
        print(fastvar.support())


def _demo_command() -> Any:
    from fastvar.demo import DemoConfig, run_demo

    @dataclass(frozen=True)
    class Demo(DemoConfig):
        """Train a tokenizer and a VAR on real handwriting, with and without a reference subject; write a report."""

        def run(self) -> None:
            results = run_demo(self)
            print(json.dumps(results, indent=2))
            print(f"report: {self.output / 'report.html'}")

    return Demo


def load_model(folder: Path) -> VAR:
    """A saved VAR with its tokenizer, on the GPU if there is one.

    Raises:
        FileNotFoundError: no model in that folder.
        RuntimeError: a model that was saved without its tokenizer.
    """
    import torch

    from fastvar.models import VAR

    var = VAR.from_pretrained(_saved("model", folder))
    var.tokenizer  # noqa: B018  # raises if there is none
    return var.to("cuda") if torch.cuda.is_available() else var


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{option}: expected at least {least}, got {value}")


def _saved(option: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{option}: expected a folder with config.json, got {folder}")
    return str(folder)


def _class_index(label: str, num_classes: int) -> int:
    if not label.isdigit() or int(label) >= num_classes:
        raise ValueError(f"sample: labels: expected class indices 0 to {num_classes - 1}, got {label!r}")
    return int(label)


def _read_image(path: Path, size: tuple[int, int]) -> Any:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    with Image.open(path) as image:
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return pil_to_tensor(resized).float() / 127.5 - 1


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version({"open_clip": "open_clip_torch", "flash_attn": "flash-attn"}.get(package, package))
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake ends in one line on standard error and exit status 2."""
    commands = {
        "train-tokenizer": TrainTokenizer,
        "train": Train,
        "sample": Sample,
        "evaluate": Evaluate,
        "demo": _demo_command(),
        "info": Info,
    }
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="fastvar",
        description="Visual autoregressive models: train, sample, evaluate.",
        args=arguments,
    )
    try:
        command.run()
    except KeyboardInterrupt:
        print("fastvar: interrupted; training goes on from its last checkpoint with the same command", file=sys.stderr)
        raise SystemExit(130) from None
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else '; install it with pip install "fastvar[train]"'
        print(f"fastvar: {error}{remedy}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastvar: {error}", file=sys.stderr)
        raise SystemExit(2) from None
