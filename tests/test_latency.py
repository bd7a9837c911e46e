"""How long models take to draw, beside a pipeline: a stand-in with the calls of diffusers that are made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastvar.cli import main
from fastvar.data.metrics import ratio_interval
from fastvar.latency import WARM_UP, measure
from fastvar.models import VAR
from tests.helpers.tiny import tiny_infinity, tiny_var


class OfClasses:
    """What pipelines share, and how those of classes are called."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.scheduler, self.calls = SimpleNamespace(), []  # type: ignore[var-annotated]
        self.safety_checker: Any = "a network"
        self.components = {"unet": nn.Linear(3, 2, dtype=dtype), "scheduler": self.scheduler}

    def to(self, device: torch.device) -> OfClasses:
        self.device = device
        return self

    def set_progress_bar_config(self, *, disable: bool) -> None:
        self.quiet = disable

    def answer(self, prompts: list[Any], generator: torch.Generator, **options: Any) -> Any:
        self.calls.append({"prompts": prompts, "seed": generator.initial_seed(), **options})
        return SimpleNamespace(images=np.zeros((len(prompts), 8, 4, 3), np.float32))

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: Any = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        assert output_type == "np" and return_dict
        return self.answer(class_labels, generator, guidance=guidance_scale, steps=num_inference_steps)


class OfTexts(OfClasses):
    """How those of texts are called."""

    def __call__(  # type: ignore[override]
        self,
        prompt: Any = None,
        height: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        generator: Any = None,
        output_type: str | None = "pil",
    ) -> Any:
        assert output_type == "np"
        return self.answer(prompt, generator, height=height, steps=num_inference_steps)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[OfClasses]:
    """Pipelines that were loaded: of texts from a folder `texts`, of classes from `classes`."""
    made: list[OfClasses] = []

    def from_pretrained(folder: str, *, dtype: torch.dtype, local_files_only: bool) -> OfClasses:
        assert local_files_only
        made.append((OfTexts if folder.endswith("texts") else OfClasses)(dtype))
        return made[-1]

    module = SimpleNamespace(DiffusionPipeline=SimpleNamespace(from_pretrained=from_pretrained), __version__="0.0")
    monkeypatch.setitem(sys.modules, "diffusers", module)
    for name in ("classes", "texts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    tiny_var().save_pretrained(tmp_path / "var")
    return made


def latency(folder: Path, *options: str, model: str = "var", pipeline: str = "classes") -> dict[str, Any]:
    output = folder / "found.json"
    common = ["--rounds", "3", "--device", "cpu", "--output", str(output)]
    main(["latency", "--model", str(folder / model), "--diffusers", str(folder / pipeline), *common, *options])
    return json.loads(output.read_text())


def test_rounds_count_and_the_first_ones_do_not() -> None:
    """Calls that take 1 and 2 s but for the warm-up, by a clock that they move, first one then the other first."""
    now, called = [0.0], []

    def call(name: str, takes: float) -> Any:
        def draw() -> torch.Tensor:
            called.append(name)
            now[0] += takes if len(called) > 2 * WARM_UP else 100
            return torch.zeros(2, 3, 4, 6)

        return draw

    found = measure({"a": call("a", 1), "b": call("b", 2)}, 2, 4, clock=lambda: now[0])
    assert found["a"] == {"image_size": [4, 6], "seconds": 1, "seconds_95": (1, 1), "rounds": [1] * 4}
    assert found["b"]["rounds"] == [2] * 4
    assert "".join(called[2 * WARM_UP :]) == "abbaabba"
    with pytest.raises(ValueError, match=r"^latency: a: expected 3 images, got shape \[2, 3, 4, 6\]$"):
        measure({"a": call("a", 1)}, 3, 2)


def test_a_model_and_a_pipeline_of_classes(
    loaded: list[OfClasses], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, generate = [], VAR.generate

    def recorded(self: VAR, labels: torch.Tensor, **options: Any) -> Any:
        drawn.append((labels.tolist(), options["seed"], options["guidance"], options["top_k"]))
        return generate(self, labels, **options)

    monkeypatch.setattr(VAR, "generate", recorded)
    options = ["--labels", "2", "4", "--batch-size", "3", "--top-k", "3", "--pipeline-options", "num_inference_steps=7"]
    found = latency(tmp_path, *options, "--dtype", "bfloat16", "--seed", "5")
    [pipeline] = loaded
    asked = {"prompts": [2, 4, 2], "seed": 5, "guidance": 4.0, "steps": 7}
    assert pipeline.calls == [asked] * (WARM_UP + 3)
    assert drawn == [([2, 4, 2], 5, 2.0, 3)] * (WARM_UP + 3)
    assert pipeline.quiet and pipeline.safety_checker is None and pipeline.device.type == "cpu"
    ours, theirs = found["fastvar"], found["diffusers"]
    assert found["images"] == 3
    assert (ours["class"], ours["image_size"]) == ("VAR", [6, 6])
    assert (theirs["class"], theirs["image_size"]) == ("OfClasses", [8, 4])
    assert theirs["options"] == {"guidance_scale": 4.0, "num_inference_steps": 7}
    assert theirs["parts"] == {"unet": {"parameters": 8, "dtypes": ["bfloat16"]}} and theirs["without_safety_checker"]
    assert ours["parts"]["transformer"]["dtypes"] == ["bfloat16"]
    var = tiny_var()
    for name, part in (("transformer", var), ("tokenizer", var.tokenizer)):
        assert ours["parts"][name]["parameters"] == sum(value.numel() for value in part.parameters())
    assert ours["options"]["guidance"] == 2.0 and len(ours["rounds"]) == len(theirs["rounds"]) == 3
    assert found["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert found["ratio_95"] == pytest.approx(ratio_interval(theirs["rounds"], ours["rounds"]))
    assert "diffusers: OfClasses, 3 images of 8 x 4: " in capsys.readouterr().out


def test_a_model_and_a_pipeline_of_texts(loaded: list[OfClasses], tmp_path: Path) -> None:
    tiny_infinity().save_pretrained(tmp_path / "infinity")
    options = ["--prompt", "a dog", "--text-encoder", "characters-12", "--pipeline-options", "height=8"]
    found = latency(tmp_path, *options, model="infinity", pipeline="texts")
    assert loaded[0].calls[-1] == {"prompts": ["a dog"], "seed": 0, "height": 8, "steps": 30}
    assert found["fastvar"]["text_encoder"] == "characters-12"
    assert found["diffusers"]["options"] == {"num_inference_steps": 30, "guidance_scale": 7.5, "height": 8}


def test_classes_beside_texts(loaded: list[OfClasses], tmp_path: Path) -> None:
    latency(tmp_path, "--labels", "1", "--prompt", "a dog", pipeline="texts")
    assert loaded[0].calls[-1]["prompts"] == ["a dog"]


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        ("classes", [], "labels: expected some, as the model or the pipeline reads them"),
        (
            "classes",
            ["--labels", "1", "--prompt", "a"],
            "prompt: expected none, as neither model nor pipeline reads them",
        ),
        ("texts", ["--labels", "1"], "prompt: expected some, as"),
        ("classes", ["--labels", "9"], "latency: labels: "),
        (
            "classes",
            ["--labels", "1", "--pipeline-options", "steps=3"],
            "guidance_scale, num_inference_steps, got steps",
        ),
        ("classes", ["--labels", "1", "--pipeline-options", "steps"], "expected OPTION=VALUE, got 'steps'"),
        ("var", ["--labels", "1"], "diffusers: expected a folder with model_index.json, got "),
    ],
)
def test_mistakes(
    loaded: list[OfClasses],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pipeline: str,
    options: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        latency(tmp_path, *options, pipeline=pipeline)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("fastvar: latency: ") and message in said and said.count("\n") == 1


def test_without_diffusers(
    loaded: list[OfClasses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit):
        latency(tmp_path, "--labels", "1")
    assert "latency: needs diffusers: pip install " in (said := capsys.readouterr().err) and "[diffusion]" in said
