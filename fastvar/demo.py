"""The demo: tokenizer and VAR on handwriting scenes, with and without a reference subject, and a report of it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvar.data import HandwritingScenes, Reader
from fastvar.evaluation import (
    MatchScore,
    ReadingScore,
    SamplingOptions,
    draw,
    evaluate_subject,
    evaluate_texts,
    every_number,
    score_reading,
)
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.report import Report, curves
from fastvar.schedule import ScaleSchedule
from fastvar.training import TokenDataset, TokenizerTask, TrainConfig, TrainResult, VARTask, train
from fastvar.training.log import read_metrics
from fastvar.training.pictures import image_grid

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take under ten minutes on two cores."""

    output: Path = Path("outputs/demo")
    tokenizer_steps: int = 600
    var_steps: int = 2200
    subject_steps: int = 600
    """Steps of fine-tuning with the subject prefix."""
    scenes: int = 16000
    """Training scenes."""
    samples: int = 400
    """Images per evaluation."""
    grids: str = "1,2,3x4,6x8"
    """Token grids; the images are four times the finest one."""
    vocab_size: int = 256
    width: int = 128
    depth: int = 4
    precision: str = "bf16"
    seed: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


DIGITS = 2
CANDIDATES = 8


def tokenizer_config(config: DemoConfig) -> VQTokenizerConfig:
    """A small tokenizer that halves the resolution twice."""
    return VQTokenizerConfig(
        grids=ScaleSchedule.parse(config.grids).grids,
        vocab_size=config.vocab_size,
        code_channels=16,
        channels=16,
        channel_multipliers=(1, 2, 4),
        blocks_per_level=1,
        norm_groups=8,
        attention=False,
    )


def var_config(config: DemoConfig, tokenizer: VQTokenizer) -> VARConfig:
    """A small VAR that writes the number it is told."""
    return VARConfig(
        grids=tokenizer.config.grids,
        depth=config.depth,
        embed_dim=config.width,
        num_heads=max(config.width // 32, 1),
        vocab_size=tokenizer.config.vocab_size,
        code_channels=tokenizer.config.code_channels,
        num_classes=0,
        text_length=DIGITS,
        gate_init=1.0,
    )


class _Clock:
    """Seconds of each part, kept over interruptions in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        write_json(self.path, self.seconds)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that an interrupted write leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, sample, read, and write `report.html`, `results.json` and the checkpoints below `config.output`.

    Whatever was finished before, in the same output folder, is not done again.

    Returns:
        the figures of `results.json`.
    """
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    clock = _Clock(output / "seconds.json")
    size = tuple(4 * side for side in ScaleSchedule.parse(config.grids).finest)
    scenes = HandwritingScenes(length=config.scenes, size=size, digits=DIGITS, split="train", seed=config.seed)
    held_out = HandwritingScenes(length=config.samples, size=size, digits=DIGITS, split="test", seed=config.seed)
    start = time.perf_counter()
    reader = Reader(cache=output / "reader.safetensors")
    clock.add("reader", time.perf_counter() - start)

    tokenizer_run = _train_tokenizer(config, scenes, held_out, clock)
    tokenizer: VQTokenizer = tokenizer_run.model
    start = time.perf_counter()
    tokens = TokenDataset(scenes, tokenizer, reference=True)
    clock.add("tokens", time.perf_counter() - start)
    plain = _train_var(config, VAR(var_config(config, tokenizer), tokenizer), tokens, held_out, "var", clock)
    var: VAR = plain.model
    var.tokenizer = tokenizer
    guided = _train_var(config, var.add_subject("block_causal"), tokens, held_out, "var-subject", clock)
    subject_var: VAR = guided.model
    subject_var.tokenizer = tokenizer

    start = time.perf_counter()
    shown = held_out.batch(list(range(len(held_out))))
    texts = every_number(DIGITS, config.samples)
    unguided = SamplingOptions(guidance=0.0, top_p=1.0, seed=config.sampling.seed)
    scores = {
        "test scenes": score_reading(shown["image"] * 0.5 + 0.5, shown["text"], reader),
        "their reconstructions": score_reading(
            tokenizer.decode(tokenizer.encode(shown["image"])) * 0.5 + 0.5, shown["text"], reader
        ),
        "samples, no guidance": evaluate_texts(var, texts, unguided, reader),
        "samples, guided": evaluate_texts(var, texts, config.sampling, reader),
    }
    scores["samples with a subject"], match = evaluate_subject(
        subject_var, held_out, config.sampling, reader, candidates=CANDIDATES
    )
    clock.add("evaluation", time.perf_counter() - start)
    results = {
        "scores": {name: score.summary() for name, score in scores.items()},
        "subject_match": match.summary(),
        "chance_word_accuracy": 10.0**-DIGITS,
        "seconds": clock.seconds,
        "seconds_in_all": sum(clock.seconds.values()),
        "threads": torch.get_num_threads(),
        "parameters": {
            "tokenizer": sum(p.numel() for p in tokenizer.parameters()),
            "var": sum(p.numel() for p in var.parameters()),
        },
    }
    write_json(output / "results.json", results)
    _report(config, scores, match, shown, tokenizer, results).write(output / "report.html")
    return results


def _train_tokenizer(
    config: DemoConfig, scenes: HandwritingScenes, held_out: HandwritingScenes, clock: _Clock
) -> TrainResult:
    torch.manual_seed(config.seed)
    task = TokenizerTask(
        VQTokenizer(tokenizer_config(config)), held_out.batch(list(range(min(8, len(held_out)))))["image"]
    )
    options = TrainConfig(
        steps=config.tokenizer_steps,
        batch_size=32,
        learning_rate=3e-3,
        weight_decay=0.0,
        ema_decay=0.99,
        precision=config.precision,
        save_every=100,
        picture_every=200,
        seed=config.seed,
    )
    result = train(task, scenes, options, config.output / "tokenizer")
    clock.add("tokenizer", result.seconds)
    return result


def _train_var(
    config: DemoConfig, model: VAR, tokens: TokenDataset, held_out: HandwritingScenes, name: str, clock: _Clock
) -> TrainResult:
    torch.manual_seed(config.seed)
    with_subject = model.config.subject != "none"
    options = TrainConfig(
        steps=config.subject_steps if with_subject else config.var_steps,
        batch_size=32,
        learning_rate=1.5e-3 if with_subject else 3e-3,
        ema_decay=0.99,
        precision=config.precision,
        save_every=100,
        picture_every=200,
        seed=config.seed,
    )
    shown = held_out.batch(list(range(min(32, len(held_out)))))

    def picture(averaged: VAR) -> Image:
        if not with_subject:
            return image_grid(draw(averaged, every_number(DIGITS, 32), config.sampling), 8, zoom=2)
        subject = averaged.tokenizer.pyramid(averaged.tokenizer.encode(shown["reference"].to(averaged.device)))
        images = draw(averaged, shown["text"], config.sampling, subject=subject)
        return _pairs(shown["reference"] * 0.5 + 0.5, images)

    result = train(VARTask(model, picture), tokens, options, config.output / name)
    clock.add(name, result.seconds)
    return result


def _pairs(left: torch.Tensor, right: torch.Tensor) -> Image:
    """Two sets of images side by side, four pairs a row."""
    return image_grid(torch.stack([left, right], 1).flatten(0, 1), 8, zoom=2)


def _percent(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _report(
    config: DemoConfig,
    scores: dict[str, ReadingScore],
    match: MatchScore,
    shown: dict[str, Any],
    tokenizer: VQTokenizer,
    results: dict[str, Any],
) -> Report:
    report = Report("fastvar demo: visual autoregressive models on real handwriting")
    report.text(
        "A VQ tokenizer and a VAR were trained from scratch on scenes composed of scanned digits. Told a number, the "
        "model writes it; given a reference image of a digit, it writes with that digit's shape and ink."
    )
    report.heading("What a reader makes of the images")
    report.table(
        ["images", "read exactly (95 % interval)", "NED"],
        [[name, _percent(s.accuracy, s.accuracy_interval), f"{s.similarity:.3f}"] for name, s in scores.items()],
    )
    report.text(
        f"Chance is {100 * results['chance_word_accuracy']:.0f} %. Guided samples: guidance "
        f"{config.sampling.guidance:g}, top-p {config.sampling.top_p:g}. {config.samples} images each."
    )
    guided = scores["samples, guided"]
    report.picture(image_grid(guided.images[:64], 8, zoom=2), "Guided samples of " + ", ".join(guided.texts[:64]))

    report.heading("Following a reference subject")
    report.table(
        ["nearest of 8 references by", "rate (95 % interval)", "chance"],
        [
            [name, _percent(match.rates[name], interval), f"{100 * match.rates['chance']:.1f} %"]
            for name, interval in match.intervals.items()
        ],
    )
    report.text(
        "The references are scans that training has not seen; the others show the same digit, other scans, other inks."
    )
    subject = scores["samples with a subject"]
    report.picture(
        _pairs(shown["reference"][:32] * 0.5 + 0.5, subject.images[:32]),
        "Left the reference, right a sample drawn with it, of " + ", ".join(subject.texts[:32]),
    )

    report.heading("The tokenizer")
    originals = shown["image"][:16] * 0.5 + 0.5
    report.picture(
        _pairs(originals, scores["their reconstructions"].images[:16]), "Left a test scene, right its reconstruction"
    )
    report.heading("Training")
    runs = {name: read_metrics(config.output / name / "metrics.jsonl") for name in ("tokenizer", "var", "var-subject")}
    report.picture(
        curves({"tokenizer": runs["tokenizer"]}, "reconstruction", ylabel="reconstruction loss"),
        "Tokenizer: reconstruction loss",
        plot=True,
    )
    report.picture(
        curves({n: runs[n] for n in ("var", "var-subject")}, "loss", ylabel="nats per token"),
        "VAR: negative log-likelihood of a token; the second run starts from the first one's weights",
        plot=True,
    )
    report.heading("Seconds")
    report.table(["part", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()])
    report.text(
        f"{results['seconds_in_all']:.0f} seconds in all on {results['threads']} threads; tokenizer "
        f"{results['parameters']['tokenizer']:,} parameters, VAR {results['parameters']['var']:,}."
    )
    return report
