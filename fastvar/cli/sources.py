"""Where commands take images, prompts and figures from: a user's files, or handwriting, which comes with fastvar.

This module and `fastvar.cli.demo` are the command line's only ones that know handwriting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastvar.cli.common import class_index
from fastvar.files import read_text
from fastvar.ranges import Count, OneOf

if TYPE_CHECKING:
    from fastvar.data import ImageFolder, TextImages
    from fastvar.handwriting import HandwritingScenes
    from fastvar.models import Model, SamplingOptions, VARConfig
    from fastvar.rl import Prompts


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str
    """"handwriting" (scenes of scanned digits, no download) or a folder of images, one subfolder per class. With texts
    (--task infinity): a folder of images, each beside a .txt of its name; a .jsonl with "image" and "text" in each
    line; or tars ("shards/*.tar") of such pairs."""
    scenes: Count = 16000
    """Handwriting: number of scenes."""
    digits: Count = 2
    """Handwriting: digits of each number."""
    reference_place: Annotated[str, OneOf("own", "scene")] = "own"
    """Handwriting: where a reference shows its digit, at a place of its "own" or as in the "scene", which is easier."""
    flip: bool = True
    """Folder: mirror images at random; switch it off for text. Images with texts are never mirrored."""
    skip_bad: bool = False
    """Images with texts: leave out those that have none or cannot be read, with a warning, instead of stopping."""

    def load(
        self, size: tuple[int, int], *, train: bool, seed: int, classes: Sequence[str] | None = None
    ) -> HandwritingScenes | ImageFolder:
        """The data set at an image size (height, width).

        Args:
            classes: of a folder, see `ImageFolder`.
        """
        from fastvar.data import ImageFolder
        from fastvar.handwriting import HandwritingScenes

        if self.data != "handwriting":
            return ImageFolder(self.data, size=size, train=train, flip=self.flip, classes=classes)
        return HandwritingScenes(
            length=self.scenes,
            size=size,
            digits=self.digits,
            split="train" if train else "test",
            seed=seed,
            reference_place=self.reference_place,
        )

    def load_with_texts(self, sizes: Sequence[tuple[int, int]], *, seed: int) -> HandwritingScenes | TextImages:
        """The images with texts to train on, at image sizes (height, width), each of them at the nearest.

        Raises:
            ValueError: as `TextImages`; handwriting at several sizes.
        """
        from fastvar.data import TextImages
        from fastvar.handwriting import HandwritingScenes

        if self.data != "handwriting":
            return TextImages(self.data, sizes=sizes, skip_bad=self.skip_bad)
        if len(sizes) > 1:
            raise ValueError(f"data: expected images of several sizes, as {len(sizes)} are asked for, got handwriting")
        return HandwritingScenes(length=self.scenes, size=sizes[0], digits=self.digits, split="train", seed=seed)


def examples(config: VARConfig, count: int) -> Any:
    """`count` texts or classes to show a model with."""
    import torch

    from fastvar.handwriting.evaluation import every_number

    if config.text_length:
        return every_number(config.text_length, count)
    return torch.arange(count) % config.num_classes


@dataclass(frozen=True)
class PromptOptions:
    """What images should show."""

    prompt_file: Path | None = None
    """A text file, a prompt on each line; for a model with a class condition CLASS TAB PROMPT, CLASS being a name or an
    index. By default every number that a VAR of handwriting can write, or texts and references of handwriting scenes
    for one with a subject prefix."""
    reference_place: Annotated[str, OneOf("own", "scene")] = "own"
    """Where handwriting's references show their digit: at a place of its "own" or as in the "scene"; as in training."""

    def load_prompts(self, var: Model, *, count: int, train: bool) -> Prompts:
        """What to draw with a model: the file's prompts, or those of handwriting (`count` scenes of a split)."""
        import torch

        from fastvar.handwriting.evaluation import prompts
        from fastvar.models import VAR
        from fastvar.rl import Prompts

        config = var.config
        if self.prompt_file is not None:
            lines = [line for line in read_text(self.prompt_file, "prompt_file").splitlines() if line.strip()]
            if config.text_length:
                if isinstance(var, VAR):
                    config.encode_text(lines)  # raises for a text that the model cannot write
                return Prompts(lines)
            columns = [line.partition("\t") for line in lines]
            for line, (_, _, text) in zip(lines, columns, strict=True):
                if not text:
                    raise ValueError(f"prompt_file: expected lines CLASS TAB PROMPT, got {line!r}")
            indices = [class_index("prompt_file: CLASS", name, config) for name, *_ in columns]
            return Prompts([text for *_, text in columns], torch.tensor(indices))
        if not isinstance(var, VAR) or not config.text_length:
            kind = "reads any text" if config.text_length else "has a class condition"
            raise ValueError(f"prompt_file: expected a file, as the model {kind}")
        return prompts(var, count, split="train" if train else "test", reference_place=self.reference_place)

    def figures(self, var: Model, samples: int, options: SamplingOptions, seed: int) -> dict[str, Any]:
        """How well a model of handwriting writes what it is asked for, ready for JSON; nothing of other prompts."""
        from fastvar.handwriting.evaluation import figures
        from fastvar.models import VAR

        if self.prompt_file is not None or not isinstance(var, VAR) or not var.config.text_length:
            return {}
        return figures(var, samples, options, seed=seed, reference_place=self.reference_place)
