"""Benchmarks of images on the command line: a model's, which are drawn, or those of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

from fastvar.builtin import READERS
from fastvar.cli.common import DrawnWith, chosen_device
from fastvar.cli.outputs import output_folder
from fastvar.files import json_text, read_text
from fastvar.ranges import CountOrNone, OneOf, check_fields

if TYPE_CHECKING:
    import torch

    from fastvar.cli.reinforcement import RewardOptions
    from fastvar.image_benchmarks import Benchmark
    from fastvar.models import Model, SamplingOptions

# The options beside `data`, `images` and `weights` that each reads, and the names of its weights.
READS = {
    "dreambench": ("take", "per_prompt", "token"),
    "cvtg-2k": ("take", "reader", "reader_options"),
    "geneval": ("take", "per_prompt"),
    "hps": ("take", "per_prompt"),
    "prompts": ("take", "per_prompt", "rewards", "reward_options", "held_out"),
    "fid": ("prompt_file",),
}
WEIGHTS = {
    "dreambench": ("dino", "clip"),
    "cvtg-2k": ("clip",),
    "geneval": ("detector", "clip"),
    "hps": ("hpsv2",),
    "prompts": (),
    "fid": ("inception",),
}
FILES = {"inception": "a file of Inception's weights", "detector": "a folder of a Mask2Former"}  # no random ones
PUBLISHED = {
    "dino": "dino",
    "clip": "openai",
    "detector": "facebook/mask2former-swin-small-coco-instance",
}  # weights by default


@dataclass(frozen=True)
class BenchmarkOptions:
    """A benchmark of images instead of rewards; see docs/evaluation.md."""

    benchmark: Annotated[str, OneOf("", *READS)] = ""
    """One of "dreambench", "cvtg-2k", "geneval", "hps", "prompts" (any rewards) and "fid"; `output` is then a folder,
    from which a run goes on that was stopped."""
    data: Path | None = None
    """Its data: the folder of dreambooth's data set, that of CVTG-2K, geneval's evaluation_metadata.jsonl, a folder of
    files of prompts by category (hps, prompts); for fid real images, or their statistics in a .npz."""
    images: Path | None = None
    """Score the images of this folder instead of a model's; docs/evaluation.md says how their files are called."""
    take: CountOrNone = 0
    """Score so many prompts, spread over all; 0 for all."""
    per_prompt: CountOrNone = 0
    """Images of each prompt; 0 for as many as are published: 4 of dreambench and geneval, 1 of the others."""
    token: str = ""
    """dreambench: what stands before the class in a prompt to the model, such as "sks"."""
    weights: tuple[str, ...] = ()
    """Weights as NAME=TAG or NAME=PATH, out of dino, clip, detector, hpsv2 and inception; "random" for a trial, but of
    inception and detector. By default the published ones of dino and clip, a Mask2Former of the Hugging Face hub, and
    torch-fidelity's of inception."""
    reader: str = "easyocr"
    """cvtg-2k: what reads images, a name of a reader as of the reward "ocr"."""
    reader_options: tuple[str, ...] = ()
    """cvtg-2k: options of the reader as OPTION=VALUE, the value as JSON has it or plain text: "download=true"."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense, without loading anything."""
        check_fields(self)
        self._check_read(self, ("benchmark", "data", "images", "weights") if self.benchmark else ())
        if not self.benchmark:
            return
        if self.data is None:
            raise ValueError(f"evaluate: data: expected the data of {self.benchmark}, got none")
        if self.reader not in READERS:
            raise ValueError(f"evaluate: reader: expected one of {tuple(READERS)}, got {self.reader!r}")
        for item in self.weights:
            name, equals, value = item.partition("=")
            names = WEIGHTS[self.benchmark]
            if not equals or name not in names:
                expected = f"NAME=TAG with NAME out of {names}" if names else "none"
                raise ValueError(f"evaluate: weights: expected {expected} for {self.benchmark}, got {item!r}")
            if value == "random" and name in FILES:
                raise ValueError(f"evaluate: weights: expected {FILES[name]}, got {item!r}")

    def _check_read(self, options: Any, beside: tuple[str, ...] = ()) -> None:
        """Raise a ValueError that names an option which is not its default, and which nothing reads."""
        of = f"for {self.benchmark}" if self.benchmark else "without a benchmark"
        for field in fields(options):
            value = getattr(options, field.name)
            if value != field.default and field.name not in (*beside, *READS.get(self.benchmark, ())):
                expected = f"expected {field.default!r} {of}, got {value!r}"
                raise ValueError(f"evaluate: {field.name}: {expected}: it is not read there")

    def run(
        self,
        drawn_with: DrawnWith,
        *,
        output: Path | None,
        samples: int,
        scoring: RewardOptions,
        device: str | None,
        seed: int,
        options: SamplingOptions,
    ) -> None:
        """Draw what is missing, score it, print the figures.

        Args:
            drawn_with: the model to draw from, unless there are images.
            output: the folder.
            samples: how many images of fid are drawn.
            scoring: the rewards of prompts, and the file of prompts of fid for a model of texts, a line each.
            device, seed, options: as `fastvar evaluate`.
        """
        from fastvar.image_benchmarks import draw_items, run_benchmark

        self._check_read(scoring)
        if (drawn_with.model is None) == (self.images is None):
            raise ValueError("evaluate: model, images: expected exactly one of them")
        if output is None:
            raise ValueError(f"evaluate: output: expected a folder for {self.benchmark}, got none")
        output_folder("output", output)
        place = chosen_device(device)
        drawn = None if drawn_with.model is None else drawn_with.load(device).eval()
        benchmark = self._made(output, drawn, samples, scoring, place)
        images = self.images
        if drawn is not None:
            images = output / "images"
            draw_items(drawn, benchmark.items, images, options, seed=seed)
        assert images is not None
        summary = run_benchmark(benchmark, images, output, device=place)
        print(json_text(summary["figures"], indent=2))

    def _made(
        self, output: Path, model: Model | None, samples: int, scoring: RewardOptions, device: torch.device
    ) -> Benchmark:
        """The benchmark with what it scores by."""
        from fastvar.image_benchmarks import (
            CVTG2K,
            FID,
            DreamBench,
            GenEval,
            HPSBenchmark,
            Mask2Former,
            PromptBenchmark,
        )
        from fastvar.rl.rewards import CLIPImageReward, CLIPTextReward, DINOReward, HPSv2Reward

        assert self.data is not None  # checked
        if self.benchmark == "dreambench":
            dino, clip = self._weights("dino"), self._weights("clip")
            return DreamBench(
                self.data,
                DINOReward(pretrained=dino),
                CLIPImageReward(pretrained=clip),
                CLIPTextReward(pretrained=clip),
                per_prompt=self.per_prompt or 4,
                take=self.take,
                token=self.token,
            )
        if self.benchmark == "cvtg-2k":
            reader = resolve_name(READERS[self.reader])(
                **options_given("evaluate: reader_options", self.reader_options)
            )
            clip_score = CLIPTextReward(pretrained=self._weights("clip"), model="ViT-L-14-quickgelu", clip_score=True)
            return CVTG2K(self.data, reader, clip_score, take=self.take)
        if self.benchmark == "geneval":
            detector = Mask2Former(self._given().get("detector", PUBLISHED["detector"]))
            clip_text = CLIPTextReward(pretrained=self._weights("clip"), model="ViT-L-14-quickgelu")
            return GenEval(self.data, detector, clip_text, per_prompt=self.per_prompt or 4, take=self.take)
        if self.benchmark == "hps":
            reward = HPSv2Reward(checkpoint=self._weights("hpsv2"))
            return HPSBenchmark(self.data, reward, per_prompt=self.per_prompt or 1, take=self.take)
        if self.benchmark == "prompts":
            return PromptBenchmark(self.data, scoring.reward(), per_prompt=self.per_prompt or 1, take=self.take)
        items = self._fid_items(model, samples, scoring.prompt_file)
        weights = self._given().get("inception")
        return FID(
            items, self.data, output / "reference", weights=None if weights is None else Path(weights), device=device
        )

    def _fid_items(self, model: Model | None, samples: int, prompt_file: Path | None) -> Any:
        from fastvar.image_benchmarks import Item, class_items, folder_items

        if model is None:
            assert self.images is not None
            return folder_items(self.images)
        if not model.config.text_length:
            return class_items(model.config.num_classes, samples)
        if prompt_file is None:
            raise ValueError("evaluate: prompt_file: expected one, as the model draws texts, got none")
        prompts = [line for line in read_text(prompt_file, "prompt_file").split("\n") if line.strip()]
        return [Item(f"{i:06d}", prompts[i % len(prompts)]) for i in range(samples)]

    def _given(self) -> dict[str, str]:
        return {name: value for name, _, value in (item.partition("=") for item in self.weights)}

    def _weights(self, name: str) -> str | None:
        """A tag, a path, or None for random ones."""
        weights: Mapping[str, str] = {**PUBLISHED, **self._given()}
        if name not in weights:
            raise ValueError(f"evaluate: weights: expected {name}=PATH for {self.benchmark}, got none")
        return None if weights[name] == "random" else weights[name]


def options_given(option: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Values by name of what was given as OPTION=VALUE; `option` opens the message."""
    from fastvar.cli.reinforcement import json_or_text

    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{option}: expected OPTION=VALUE, got {item!r}")
        options[name] = json_or_text(value)
    return options
