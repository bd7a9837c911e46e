"""Where commands take images, prompts and figures from: a user's files, or handwriting, which comes with fastvar.

This module and `fastvar.cli.demo` are the command line's only ones that know handwriting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastvar.cli.common import class_index
from fastvar.files import read_text
from fastvar.ranges import Count, OneOf

if TYPE_CHECKING:
    from fastvar.data import ImageFolder, SubjectPairs, TextImages, TextPrompt
    from fastvar.handwriting import HandwritingScenes, MixedScenes
    from fastvar.models import Model, SamplingOptions, VARConfig
    from fastvar.rl import Prompts


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: str
    """"handwriting" (scenes of scanned digits, no download) or a folder of images, one subfolder per class. With texts
    (--task infinity): a folder of images, each beside a .txt of its name; a .jsonl with "image" and "text" in each
    line; or tars ("shards/*.tar") of such pairs. With texts and references of a subject (--subject): a .jsonl with a
    list "references" in each line too, or a folder of subjects, each with a folder "references"."""
    scenes: Count = 16000
    """Handwriting: number of scenes."""
    digits: Count = 2
    """Handwriting: digits of each number."""
    region_shares: tuple[str, ...] = ()
    """Shares of images by their regions of text, "2=0.2 3=0.3 4=0.3 5=0.2" (6 is six and more). Images with texts:
    those with another number are left out, and the shares are as the data has them. Handwriting: scenes with so many
    digits, in these shares, instead of --digits. Images of classes and pairs with references have none."""
    reference_place: Annotated[str, OneOf("own", "scene")] = "own"
    """Handwriting: where a reference shows its digit, at a place of its "own" or as in the "scene", which is easier."""
    flip: bool = True
    """Folder: mirror images at random; switch it off for text. Images with texts are never mirrored."""
    skip_bad: bool = False
    """Images with texts: leave out those that have none or cannot be read, with a warning, instead of stopping."""

    @property
    def has_references(self) -> bool:
        """Whether each image comes with a reference of its subject."""
        from fastvar.data.pairs import is_pairs

        return self.data == "handwriting" or is_pairs(self.data)

    def load(
        self, size: tuple[int, int], *, train: bool, seed: int, classes: Sequence[str] | None = None
    ) -> HandwritingScenes | MixedScenes | ImageFolder | SubjectPairs:
        """The data set at an image size (height, width).

        Args:
            classes: of a folder, see `ImageFolder`.
        """
        from fastvar.data import ImageFolder, SubjectPairs
        from fastvar.data.pairs import is_pairs

        if self.data == "handwriting":
            return self._handwriting(size, "train" if train else "test", seed)
        self._refuse_shares()
        if is_pairs(self.data):
            return SubjectPairs(self.data, sizes=[size], skip_bad=self.skip_bad)
        return ImageFolder(self.data, size=size, train=train, flip=self.flip, classes=classes)

    def _refuse_shares(self) -> None:
        if self.region_shares:
            raise ValueError(
                "region_shares: expected none, as only handwriting and images with texts (--task infinity) have any, "
                f"got {' '.join(self.region_shares)} with {self.data}"
            )

    def _handwriting(self, size: tuple[int, int], split: str, seed: int) -> HandwritingScenes | MixedScenes:
        from fastvar.handwriting import HandwritingScenes, MixedScenes

        options: dict[str, Any] = {"size": size, "split": split, "seed": seed, "reference_place": self.reference_place}
        if self.region_shares:
            return MixedScenes(length=self.scenes, shares=parse_shares(self.region_shares), **options)
        return HandwritingScenes(length=self.scenes, digits=self.digits, **options)

    def load_with_texts(
        self, sizes: Sequence[tuple[int, int]], *, seed: int
    ) -> HandwritingScenes | MixedScenes | TextImages | SubjectPairs:
        """The images with texts to train on, at image sizes (height, width), each of them at the nearest.

        Raises:
            ValueError: as `TextImages`; handwriting at several sizes.
        """
        from fastvar.data import SubjectPairs, TextImages
        from fastvar.data.pairs import is_pairs

        if self.data != "handwriting":
            if is_pairs(self.data):
                self._refuse_shares()
                return SubjectPairs(self.data, sizes=sizes, skip_bad=self.skip_bad)
            regions = [number for number, share in parse_shares(self.region_shares).items() if share]
            return TextImages(self.data, sizes=sizes, skip_bad=self.skip_bad, regions=regions)
        if len(sizes) > 1:
            raise ValueError(f"data: expected images of several sizes, as {len(sizes)} are asked for, got handwriting")
        return self._handwriting(sizes[0], "train", seed)


def parse_shares(texts: Sequence[str]) -> dict[int, float]:
    """{2: 0.2, ...} of texts like "2=0.2".

    Raises:
        ValueError: another text, a bin outside 1 to 6, a share that is none.
    """
    from fastvar.data.regions import MORE, quotas

    shares = {}
    for text in texts:
        number, _, share = text.partition("=")
        try:
            shares[int(number)] = float(share)
        except ValueError:
            raise ValueError(f"region_shares: expected REGIONS=SHARE, got {text!r}") from None
    if shares:
        if not all(1 <= number <= MORE for number in shares):
            raise ValueError(f"region_shares: expected regions from 1 to {MORE}, got {list(shares)}")
        try:
            quotas(shares, 1)
        except ValueError as error:
            raise ValueError(f"region_shares: {error}") from None
    return shares


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
    """A text file, a prompt on each line (as flow_grpo's OCR prompts are); for a model with a class condition CLASS TAB
    PROMPT, CLASS being a name or an index. Or a .json of LeX-Bench, or the folder of CVTG-2K. By default every number
    that a VAR of handwriting can write, or texts and references of handwriting scenes for one with a subject prefix."""
    prompt_words: Path | None = None
    """Instead of prompts a text file of words, one on each line: prompts that ask for texts of them are made."""
    prompt_templates: Path | None = None
    """A text file of templates for these words, one on each line, with {} for the texts; fastvar has some."""
    region_shares: tuple[str, ...] = ()
    """Shares of prompts by how many texts they ask for, "2=0.2 3=0.3 4=0.3 5=0.2" (6 is six and more): evaluations draw
    prompts in these shares, training leaves out those with another number; numbers and prompts of words are made in
    them. A number counts its digits."""
    references: tuple[Path, ...] = ()
    """Photos of one subject, for a model with a subject prefix: every prompt is asked for with each of them, which is
    also what its images are compared with."""
    reference_place: Annotated[str, OneOf("own", "scene")] = "own"
    """Where handwriting's references show their digit: at a place of its "own" or as in the "scene"; as in training."""

    def load_prompts(self, var: Model, *, count: int, train: bool) -> Prompts:
        """What to draw with a model: the file's prompts, those made of words, or those of handwriting (`count` scenes
        of a split), with each of the references."""
        from fastvar.data.pairs import read_references
        from fastvar.rl import Prompts

        found = self._prompts(var, count, train)
        if not self.references:
            return found
        photos = read_references(self.references, var.tokenizer.config.image_size, "references") * 0.5 + 0.5
        repeated = found.repeated(len(photos))
        return Prompts(repeated.texts, repeated.labels, photos.repeat(len(found), 1, 1, 1))

    def _prompts(self, var: Model, count: int, train: bool) -> Prompts:
        import torch

        from fastvar.handwriting.evaluation import numbers, prompts
        from fastvar.models import VAR
        from fastvar.rl import Prompts

        config: Any
        config, shares = var.config, parse_shares(self.region_shares)
        if self.prompt_file is not None or self.prompt_words is not None:
            chosen = [item.prompt for item in self._text_prompts(shares, count, train)]
            if config.text_length:
                if isinstance(var, VAR):
                    config.encode_text(chosen)  # raises for a text that the model cannot write
                return Prompts(chosen)
            columns = [line.partition("\t") for line in chosen]
            for line, (_, _, text) in zip(chosen, columns, strict=True):
                if not text:
                    raise ValueError(f"prompt_file: expected lines CLASS TAB PROMPT, got {line!r}")
            indices = [class_index("prompt_file: CLASS", name, config) for name, *_ in columns]
            return Prompts([text for *_, text in columns], torch.tensor(indices))
        if not config.text_length:
            raise ValueError("prompt_file: expected a file, as the model has a class condition")
        if not isinstance(var, VAR):
            if not shares:
                raise ValueError(
                    "prompt_file: expected a file, or --region-shares for numbers, as the model reads any text: "
                    "2=1 asks one of handwriting for two digits"
                )
            return Prompts(numbers(count, shares))
        split = "train" if train else "test"
        return prompts(var, count, split=split, reference_place=self.reference_place, shares=shares)

    def _text_prompts(self, shares: Mapping[int, float], count: int, train: bool) -> list[TextPrompt]:
        from fastvar.data import draw_by_regions, make_prompts, read_prompts
        from fastvar.data.prompt_sets import TEMPLATES
        from fastvar.data.regions import largest_draw, with_regions

        if self.prompt_words is not None:
            if self.prompt_file is not None:
                raise ValueError("prompt_words: expected none beside --prompt-file")
            words = read_text(self.prompt_words, "prompt_words").split()
            templates: Sequence[str] = TEMPLATES
            if self.prompt_templates is not None:
                lines = read_text(self.prompt_templates, "prompt_templates").split("\n")
                templates = [line.strip() for line in lines if line.strip()]
            # the prompts of evaluations are others than those of training
            return make_prompts(words, count, templates=templates, shares=shares or None, seed=0 if train else 1)
        assert self.prompt_file is not None
        found = read_prompts(self.prompt_file)
        if not shares:
            return found
        regions = [item.regions for item in found]
        if train:
            chosen = with_regions(regions, [number for number, share in shares.items() if share])
        else:
            chosen = draw_by_regions(regions, min(count, largest_draw(regions, shares)), shares=shares)
        if not chosen:
            raise ValueError(f"region_shares: expected prompts of each of {list(shares)} texts in {self.prompt_file}")
        return [found[i] for i in chosen]

    def figures(self, var: Model, samples: int, options: SamplingOptions, seed: int) -> dict[str, Any]:
        """How well a model of handwriting writes what it is asked for, ready for JSON; nothing of other prompts."""
        from fastvar.handwriting.evaluation import figures
        from fastvar.models import VAR

        shares = parse_shares(self.region_shares)
        if self.prompt_file is not None or self.prompt_words is not None:
            return {}
        if not var.config.text_length:
            return {}
        if not isinstance(var, VAR) and (not shares or var.config.subject != "none"):
            return {}
        return figures(var, samples, options, seed=seed, reference_place=self.reference_place, shares=shares)
