"""Commands that train a tokenizer or a VAR and sample from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastvar.cli.common import Flat, class_index, load_model, load_saved, train_on
from fastvar.cli.outputs import output_file, output_folder, say
from fastvar.cli.sources import DataOptions, examples
from fastvar.evaluation import SamplingOptions
from fastvar.models.var_config import SUBJECTS
from fastvar.random import derive
from fastvar.ranges import Count, OneOf, Positive, Range, Share
from fastvar.training.loop import TrainConfig

if TYPE_CHECKING:
    from fastvar.data import ImageFolder
    from fastvar.models import VAR


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a VQ tokenizer."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    data: Annotated[DataOptions, Flat]
    grids: str = "1,2,3x4,6x8"
    """Token grids, coarse to fine ("1,2,3x4" are 1x1, 2x2, 3x4), or a preset such as "var-256"."""
    vocab_size: Count = 256
    """Entries of the codebook."""
    code_channels: Count = 16
    """Channels of a code."""
    channels: Count = 16
    """Width of the first convolution."""
    channel_multipliers: Annotated[tuple[int, ...], Range(1)] = (1, 2, 4)
    """Width of each resolution in units of `channels`; images are 2^(count - 1) times the finest grid."""
    blocks_per_level: Count = 1
    """Residual blocks of each resolution."""
    norm_groups: Count = 8
    """Groups of the group norms; must divide every width."""
    attention: bool = False
    """Attention on the coarsest resolution."""
    chroma_gain: Positive = 3.5
    """Enlarge colour against grey for the networks and the loss; 1 leaves images as they are."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=lambda: TrainConfig(weight_decay=0.0))

    def run(self) -> None:
        import torch

        from fastvar.models import VQTokenizer, VQTokenizerConfig
        from fastvar.schedule import ScaleSchedule
        from fastvar.training import TokenizerTask, train

        output_folder("output", self.output)
        train_on(self.device)
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
        torch.manual_seed(derive(self.train.seed, "weights"))
        result = train(TokenizerTask(VQTokenizer(config), examples), dataset, self.train, self.output)
        say(f"tokenizer: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")


@dataclass(frozen=True)
class Train:
    """Train a VAR on a tokenizer's tokens."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    tokenizer: Path
    """Folder of a trained tokenizer, or of the run that trained it."""
    data: Annotated[DataOptions, Flat]
    start: Path | None = None
    """Folder of a VAR to start from instead of random weights; depth, width, heads and classes are its own."""
    depth: Count = 4
    """Number of blocks."""
    width: Count = 128
    """Width of the residual stream."""
    heads: Count = 4
    """Attention heads."""
    subject: Annotated[str, OneOf(*SUBJECTS)] = "none"
    """Prefix of a reference subject: "none", "block_causal" or "bidirectional". Only for data with references."""
    cache_tokens: bool = False
    """Encode the whole data set once, in memory, instead of every batch; images are then not augmented anew."""
    label_smoothing: Share = 0.0
    """Share of the target that goes to all tokens alike."""
    scale_weights: Annotated[tuple[float, ...], Range(0)] = ()
    """How much a token of each scale counts in the loss, coarse to fine; all alike by default."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)

    def run(self) -> None:
        import torch

        from fastvar.models import VAR, VARConfig, VQTokenizer
        from fastvar.training import TokenDataset, VARTask, train

        output_folder("output", self.output)
        train_on(self.device)
        tokenizer = load_saved("tokenizer", VQTokenizer, self.tokenizer)
        start = None if self.start is None else load_saved("start", VAR, self.start)
        classes = start.config.class_names if start is not None else ()
        size = tokenizer.config.image_size
        dataset: Any = self.data.load(size, train=True, seed=self.train.seed, classes=classes or None)
        text_length = getattr(dataset, "text_length", 0)
        if start is not None and bool(start.config.text_length) != bool(text_length):
            condition = "a text condition" if text_length else "classes"
            raise ValueError(f"train: start: expected a model with {condition}, as {self.data.data} has")
        if start is not None and not text_length and dataset.num_classes != start.config.num_classes:
            raise ValueError(
                f"train: start: expected a model of {dataset.num_classes} classes, as {self.data.data} has, "
                f"got {start.config.num_classes}"
            )
        torch.manual_seed(derive(self.train.seed, "weights"))
        if start is not None:
            model = start
            model.tokenizer = tokenizer
            if not text_length:
                model.config = replace(model.config, class_names=_class_names(dataset))
            if self.subject not in ("none", model.config.subject):
                model = model.add_subject(self.subject)
        else:
            model = VAR(
                VARConfig(
                    grids=tokenizer.config.grids,
                    depth=self.depth,
                    embed_dim=self.width,
                    num_heads=self.heads,
                    vocab_size=tokenizer.config.vocab_size,
                    code_channels=tokenizer.config.code_channels,
                    num_classes=0 if text_length else dataset.num_classes,
                    class_names=() if text_length else _class_names(dataset),
                    text_length=text_length,
                    subject=self.subject,
                ),
                tokenizer,
            )
        if model.config.subject != "none" and "reference" not in dataset[0]:
            raise ValueError(f'train: subject: expected "none", as {self.data.data} has no references')
        task = VARTask(
            model,
            self._picture,
            label_smoothing=self.label_smoothing,
            scale_weights=self.scale_weights or None,
        )
        if self.cache_tokens:
            dataset = TokenDataset(dataset, tokenizer, reference=model.config.subject != "none")
        result = train(task, dataset, self.train, self.output)
        say(f"var: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")

    def _picture(self, model: VAR) -> Any:
        from fastvar.evaluation import draw
        from fastvar.pictures import image_grid

        return image_grid(draw(model, examples(model.config, 32), SamplingOptions()), 8)


def _class_names(folder: ImageFolder) -> tuple[str, ...]:
    return () if folder.classes == [""] else tuple(folder.classes)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained VAR and save them as one PNG."""

    model: Path
    """Folder of the model, or of the run that trained it."""
    labels: tuple[str, ...]
    """What to draw: classes by name or index (a class called "7" comes before the index 7), or texts for a model with a
    text condition."""
    output: Path = Path("samples.png")
    """The picture, a .png; one row per label."""
    count: Count = 8
    """Images per label."""
    subject: Path | None = None
    """An image of the reference subject, for a model with a subject prefix."""
    zoom: Count = 1
    """Repeat each pixel so many times."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""
    options: Annotated[SamplingOptions, Flat] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        import torch

        from fastvar.evaluation import draw
        from fastvar.pictures import image_grid, save_picture

        output_file("output", self.output, ".png")
        var = load_model(self.model, device=self.device)
        texts = [label for label in self.labels for _ in range(self.count)]
        labels: Any = texts
        if not var.config.text_length:
            labels = torch.tensor([class_index("sample: labels", label, var.config) for label in texts])
        subject = None
        if self.subject is not None:
            image = _read_image(self.subject, var.tokenizer.config.image_size)
            tokens = var.tokenizer.encode(image[None].to(var.device))
            subject = var.tokenizer.pyramid(tokens).expand(len(texts), -1, -1)
        save_picture(
            image_grid(draw(var, labels, self.options, subject=subject), self.count, zoom=self.zoom), self.output
        )
        print(self.output)


def _read_image(path: Path, size: tuple[int, int]) -> Any:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from fastvar.pictures import read_picture

    resized = read_picture(path, "sample: subject").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return pil_to_tensor(resized).float() / 127.5 - 1
