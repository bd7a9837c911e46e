"""Commands that train a tokenizer and a transformer and sample from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastvar.cli.common import Flat, chosen_device, class_index, load_model, load_saved, train_on
from fastvar.cli.outputs import output_file, output_folder, say
from fastvar.cli.sources import DataOptions, examples
from fastvar.evaluation import GUIDED
from fastvar.models import SamplingOptions
from fastvar.models.injection import SUBJECTS
from fastvar.random import derive
from fastvar.ranges import Count, CountOrNone, Number, OneOf, Positive, Range, Seed, Share
from fastvar.schedule import INFINITY_BUDGETS
from fastvar.training.loop import TrainConfig

if TYPE_CHECKING:
    from fastvar.data import ImageFolder
    from fastvar.models import VAR, Infinity


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer: a VQ tokenizer with a codebook, for a VAR, or a bitwise one, for an Infinity."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    data: Annotated[DataOptions, Flat]
    grids: str = "1,2,3x4,6x8"
    """Token grids, coarse to fine ("1,2,3x4" are 1x1, 2x2, 3x4), or a preset such as "var-256"."""
    bits: CountOrNone = 0
    """Bits of a token of a bitwise tokenizer; 0 for one with a codebook."""
    vocab_size: Count = 256
    """Entries of the codebook."""
    code_channels: Count = 16
    """Channels of a code of the codebook."""
    channels: Count = 16
    """Width of the first convolution."""
    channel_multipliers: Annotated[tuple[int, ...], Range(1)] = (1, 2, 4)
    """Width of each resolution in units of `channels`; images are 2^(count - 1) times the finest grid."""
    blocks_per_level: Count = 1
    """Residual blocks of each resolution."""
    norm_groups: Count = 8
    """Groups of the group norms; must divide every width."""
    attention: bool = False
    """Attention on the coarsest resolution; a bitwise tokenizer has none."""
    chroma_gain: Positive = 3.5
    """Enlarge colour against grey for the networks and the loss; 1 leaves images as they are, as bitwise ones do."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=lambda: TrainConfig(weight_decay=0.0))

    def run(self) -> None:
        import torch

        from fastvar.models import BSQTokenizer, BSQTokenizerConfig, VQTokenizer, VQTokenizerConfig
        from fastvar.schedule import ScaleSchedule
        from fastvar.training import TokenizerTask, train

        output_folder("output", self.output)
        train_on(self.device)
        shape: dict[str, Any] = {
            "grids": ScaleSchedule.parse(self.grids).grids,
            "channels": self.channels,
            "channel_multipliers": self.channel_multipliers,
            "blocks_per_level": self.blocks_per_level,
            "norm_groups": self.norm_groups,
        }
        kind: Any
        config: Any
        if self.bits:
            kind, config = BSQTokenizer, BSQTokenizerConfig(bits=self.bits, **shape)
        else:
            kind, config = (
                VQTokenizer,
                VQTokenizerConfig(
                    vocab_size=self.vocab_size,
                    code_channels=self.code_channels,
                    attention=self.attention,
                    chroma_gain=self.chroma_gain,
                    **shape,
                ),
            )
        dataset = self.data.load(config.image_size, train=True, seed=self.train.seed)
        held_out = self.data.load(config.image_size, train=False, seed=self.train.seed)
        examples = torch.stack([held_out[i]["image"] for i in range(min(8, len(held_out)))])
        torch.manual_seed(derive(self.train.seed, "weights"))
        result = train(TokenizerTask(kind(config), examples), dataset, self.train, self.output)
        say(f"tokenizer: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")


# options of a task alone
_VAR = ("cache_tokens", "label_smoothing", "scale_weights")
_INFINITY = ("text_encoder", "budget", "flip_strength")


@dataclass(frozen=True)
class Train:
    """Train a VAR or an Infinity on a tokenizer's tokens."""

    output: Path
    """Folder of the run: model, metrics, pictures, checkpoints. An interrupted run goes on from here."""
    tokenizer: Path
    """Folder of a trained tokenizer, or of the run that trained it; for public weights of an Infinity their file."""
    data: Annotated[DataOptions, Flat]
    task: Annotated[str, OneOf("var", "infinity")] = "var"
    """What to train: a "var", of classes or short texts, or an "infinity", of texts."""
    start: Path | None = None
    """Folder of a model to start from instead of random weights, or a file of an Infinity's public ones; depth, width,
    heads and classes are its own."""
    depth: Count = 4
    """Number of blocks."""
    width: Count = 128
    """Width of the residual stream."""
    heads: Count = 4
    """Attention heads."""
    text_encoder: str = ""
    """Infinity: what reads texts: a folder of `fastvar encode-text`, "characters", or a T5 by its folder or its name on
    the Hugging Face hub. By default that of the model to start from."""
    budget: Annotated[str, OneOf("", *INFINITY_BUDGETS)] = ""
    """Infinity: pixels of the images, "0.06M", "0.25M", "0.60M" or "1M", in batches of one ratio of height to width
    each. By default all images have the size of the tokenizer's grids, or of the model's to start from."""
    flip_strength: Share = 0.3
    """Infinity: the largest probability of a flipped bit in the inputs (self-correction); 0 for none."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass: less memory, more time."""
    subject: Annotated[str, OneOf(*SUBJECTS)] = "none"
    """Prefix of a reference subject: "none"; all its scales, "block_causal" or "bidirectional"; "last_scale", the
    finest alone; "interleaved", where a scale of the image sees the subject's up to it. Only for data with
    references."""
    subject_own_tokens: bool = False
    """Each scale of the subject is the codes of its own tokens, instead of the complete feature map resized."""
    gate_init: Number = 0.0
    """Where the residual gates start; small models that are trained for minutes learn faster from 1."""
    cache_tokens: bool = False
    """VAR: encode the whole data set once, in memory, instead of every batch; images are then not augmented anew."""
    label_smoothing: Share = 0.0
    """VAR: share of the target that goes to all tokens alike."""
    scale_weights: Annotated[tuple[float, ...], Range(0)] = ()
    """VAR: how much a token of each scale counts in the loss, coarse to fine; all alike by default."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)

    def run(self) -> None:
        import torch

        from fastvar.models import VAR, VARConfig, VQTokenizer
        from fastvar.training import TokenDataset, VARTask, train

        output_folder("output", self.output)
        train_on(self.device)
        self._check_task()
        if self.task == "infinity":
            from fastvar.cli.infinity import train_infinity

            trained = train_infinity(self)
            say(f"infinity: {trained.output / 'model'} ({trained.steps_run} steps, {trained.seconds:.0f} s)")
            return
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
            own_tokens = model.config.subject_own_tokens
            if self.subject != "none" and (self.subject, self.subject_own_tokens) != (model.config.subject, own_tokens):
                model = model.add_subject(self.subject, own_tokens=self.subject_own_tokens)
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
                    alphabet=getattr(dataset, "alphabet", VARConfig.alphabet),
                    subject=self.subject,
                    subject_own_tokens=self.subject_own_tokens,
                    gate_init=self.gate_init,
                ),
                tokenizer,
            )
        if model.config.subject != "none" and "reference" not in dataset[0]:
            raise ValueError(f'train: subject: expected "none", as {self.data.data} has no references')
        model.gradient_checkpointing = self.gradient_checkpointing
        texts = getattr(dataset, "texts", None)
        shown = examples(model.config, 32) if texts is None else [texts[i % len(texts)] for i in range(32)]
        task = VARTask(
            model,
            lambda averaged: self._picture(averaged, shown),
            label_smoothing=self.label_smoothing,
            scale_weights=self.scale_weights or None,
        )
        if self.cache_tokens:
            dataset = TokenDataset(dataset, tokenizer, reference=model.config.subject != "none")
        result = train(task, dataset, self.train, self.output)
        say(f"var: {result.output / 'model'} ({result.steps_run} steps, {result.seconds:.0f} s)")

    def _check_task(self) -> None:
        """Raise a ValueError that names an option which is another task's, or goes with another one."""
        if self.subject_own_tokens and self.subject == "none":
            raise ValueError("train: subject_own_tokens: expected False without a subject, got True")
        others = _INFINITY if self.task == "var" else _VAR
        for field_ in fields(self):
            if field_.name in others and getattr(self, field_.name) != field_.default:
                raise ValueError(
                    f"train: {field_.name}: expected none with the task {self.task}, as it has no such option"
                )

    def _picture(self, model: VAR, shown: Any) -> Any:
        from fastvar.evaluation import draw
        from fastvar.pictures import image_grid

        return image_grid(draw(model, shown, GUIDED), 8)


def _class_names(folder: ImageFolder) -> tuple[str, ...]:
    return () if folder.classes == [""] else tuple(folder.classes)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained VAR or Infinity and save them as one PNG."""

    model: Path
    """Folder of the model, or of the run that trained it; or public weights of an Infinity."""
    labels: tuple[str, ...] = ()
    """What to draw: classes by name or index (a class called "7" comes before the index 7), or texts for a model with a
    text condition."""
    prompt: tuple[str, ...] = ()
    """What to draw with a model of texts: one or several of them."""
    output: Path = Path("samples.png")
    """The picture, a .png; one row per label."""
    negative: str = ""
    """Infinity: a text that guidance keeps away from, instead of what the model has learned for none."""
    count: Count = 8
    """Images per label."""
    references: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--subject"])] = ()
    """Photos of the reference subject, for a model with a subject prefix; the images of a label show one after the
    other."""
    tokenizer: Path | None = None
    """Infinity: the tokenizer's file or folder, if the model was not saved with it."""
    text_encoder: str = ""
    """Infinity: what reads the prompts, as in `fastvar train`; by default what the model was trained with."""
    grids: str = ""
    """Infinity: token grids, which decide the size of the images, or a preset such as "infinity-0.25M-1.500" (pixels
    and height / width); by default the model's own."""
    dtype: Annotated[str, OneOf("", "float32", "bfloat16")] = ""
    """Infinity: "float32" or "bfloat16" for the weights; by default as they were saved."""
    zoom: Count = 1
    """Repeat each pixel so many times."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""
    seed: Seed = 0
    """Seed of the samples."""
    options: Annotated[SamplingOptions, Flat] = GUIDED

    def run(self) -> None:
        import torch

        from fastvar.cli.infinity import is_infinity
        from fastvar.data.pairs import read_references
        from fastvar.evaluation import draw
        from fastvar.pictures import image_grid, save_picture

        output_file("output", self.output, ".png")
        if bool(self.labels) == bool(self.prompt):
            raise ValueError("sample: labels, prompt: expected exactly one of them")
        texts = [label for label in self.labels or self.prompt for _ in range(self.count)]
        infinity = is_infinity(self.model)
        for name in () if infinity else ("negative", "tokenizer", "text_encoder", "grids", "dtype"):
            if getattr(self, name):
                raise ValueError(f"sample: {name}: expected none with a VAR, as it has no such option")
        model: Any = self._infinity() if infinity else load_model(self.model, device=self.device)
        if self.prompt and not model.config.text_length:
            raise ValueError("sample: prompt: expected none, but labels, as the model has a class condition")
        labels: Any = texts
        if not model.config.text_length:
            labels = torch.tensor([class_index("sample: labels", label, model.config) for label in texts])
        subject = None
        if self.references:
            if self.grids:
                raise ValueError("sample: grids: expected none with a subject, which has the model's own")
            photos = read_references(self.references, model.tokenizer.config.image_size, "sample: subject")
            pyramids = model.pyramid(model.tokenizer.encode(photos.to(model.device)))
            subject = pyramids[torch.arange(self.count) % len(photos)].repeat(len(texts) // self.count, 1, 1)
        images = draw(model, labels, self.options, seed=self.seed, subject=subject, negative=self.negative or None)
        save_picture(image_grid(images, self.count, zoom=self.zoom), self.output)
        print(self.output)

    def _infinity(self) -> Infinity:
        """The model with its text encoder, on its device."""
        import torch

        from fastvar.cli.infinity import encoder_of, load
        from fastvar.schedule import ScaleSchedule

        device = chosen_device(self.device)
        net = load("model", self.model, self.tokenizer, ScaleSchedule.parse(self.grids) if self.grids else None)
        net.text_encoder = encoder_of(self.text_encoder, net.config, device)
        return net.to(device, getattr(torch, self.dtype) if self.dtype else None)
