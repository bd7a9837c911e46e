"""The command that measures how long a model takes to draw, beside a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

from fastvar.cli.common import Flat, ModelOptions, class_index
from fastvar.cli.outputs import output_file
from fastvar.evaluation import GUIDED
from fastvar.files import write_json
from fastvar.models import SamplingOptions
from fastvar.ranges import OneOf, Range, Seed

ONE_IMAGE = replace(GUIDED, batch_size=1)


@dataclass(frozen=True)
class Latency:
    """Measure how long a VAR or an Infinity and a diffusion model of diffusers take to draw a batch of images."""

    drawn_with: Annotated[ModelOptions, Flat]
    diffusers: Path
    """Folder of a pipeline, with model_index.json. It is called as it was saved, with its own scheduler."""
    labels: tuple[str, ...] = ()
    """Classes for a model or pipeline of classes, such as DiT: by name or index for the model, and of the same indices
    for the pipeline; in turns, if a batch has more images."""
    prompt: tuple[str, ...] = ()
    """Texts for a model or pipeline of texts, in turns."""
    pipeline_options: tuple[str, ...] = ()
    """What the pipeline is called with as OPTION=VALUE: "num_inference_steps=20", "guidance_scale=4", "height=256"; by
    default what it has itself."""
    dtype: Annotated[str, OneOf("", "float32", "bfloat16")] = ""
    """Dtype of the weights of the pipeline and of our transformer, whose tokenizer stays as it is: "float32" or
    "bfloat16"; by default that of the model as it was saved."""
    rounds: Annotated[int, Range(2)] = 20
    """How often each is measured, in turns, after three rounds that do not count."""
    output: Path = Path("latency.json")
    """The figures, a .json."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""
    seed: Seed = 0
    """Seed of the samples."""
    options: Annotated[SamplingOptions, Flat] = ONE_IMAGE

    def run(self) -> None:
        import torch

        from fastvar.cli.benchmarks import options_given
        from fastvar.latency import Pipeline, describe_model, measure, our_call, ratio
        from fastvar.models import EncodedTexts
        from fastvar.provenance import provenance

        output_file("output", self.output, ".json")
        self.options.check()
        given = options_given("latency: pipeline_options", self.pipeline_options)
        model: Any = self.drawn_with.load(self.device).eval()
        if isinstance(getattr(model, "text_encoder", None), EncodedTexts):
            raise ValueError("latency: text_encoder: expected one that reads texts, got features that were kept")
        if self.dtype:
            model = model.to(getattr(torch, self.dtype))
        first = next(model.parameters())
        pipeline = Pipeline(self.diffusers, first.dtype, first.device, given)
        ours, theirs = self._prompts(model, pipeline.draws_classes)
        images = self.options.batch_size
        found = measure(
            {
                "fastvar": our_call(model, ours, self.options, self.seed),
                "diffusers": pipeline.call(theirs, self.seed),
            },
            images,
            self.rounds,
        )
        about = {
            "fastvar": describe_model(model, self.drawn_with.model, self.options),
            "diffusers": pipeline.describe(),
        }
        compared = ratio(found["diffusers"]["rounds"], found["fastvar"]["rounds"])
        figures = {name: {**about[name], **found[name]} for name in found}
        write_json(self.output, {"images": images, **compared, **figures, "made_with": provenance()})
        for name, its in figures.items():
            low, high = its["seconds_95"]
            height, width = its["image_size"]
            print(
                f"{name}: {its['class']}, {images} images of {height} x {width}: "
                f"{its['seconds']:.4g} s ({low:.4g} to {high:.4g})"
            )
        low, high = compared["ratio_95"]
        print(f"ratio: {compared['ratio']:.3g} ({low:.3g} to {high:.3g}); {self.output}")

    def _prompts(self, model: Any, classes: bool) -> tuple[Any, list[Any]]:
        """A batch of what the model draws, and of what the pipeline does: `classes`, or texts.

        Raises:
            ValueError: neither reads what was given, or one lacks what it reads.
        """
        import torch

        own_classes = not model.config.text_length
        for option, read in (("labels", own_classes or classes), ("prompt", not (own_classes and classes))):
            if read != bool(getattr(self, option)):
                raise ValueError(
                    f"latency: {option}: expected {'some' if read else 'none'}, as "
                    f"{'the model or the pipeline reads' if read else 'neither model nor pipeline reads'} them"
                )
        indices = [
            class_index("latency: labels", label, model.config) if own_classes else _index(label)
            for label in self.labels
        ]
        ours, theirs = (
            list(islice(cycle(indices if wanted else self.prompt), self.options.batch_size))
            for wanted in (own_classes, classes)
        )
        return torch.tensor(ours) if own_classes else ours, theirs


def _index(label: str) -> int:
    if not label.isdecimal():
        raise ValueError(f"latency: labels: expected indices, as the model has no classes, got {label!r}")
    return int(label)
