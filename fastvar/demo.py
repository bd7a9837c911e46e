"""The demo: tokenizer and VAR on handwriting scenes, with and without a reference subject, and a report of it."""

from __future__ import annotations

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
from fastvar.files import write_json
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
    """Folder of the report, the figures and the runs."""
    tokenizer_steps: int = 900
    """Steps of the tokenizer."""
    var_steps: int = 2000
    """Steps of the VAR without a subject."""
    subject_steps: int = 700
    """Steps of fine-tuning with the subject prefix."""
    scenes: int = 16000
    """Training scenes."""
    samples: int = 400
    """Images per evaluation."""
    grids: str = "1,2,3x4,6x8"
    """Token grids; the images are four times the finest one."""
    vocab_size: int = 256
    """Entries of the codebook."""
    width: int = 128
    """Width of the VAR's residual stream."""
    depth: int = 4
    """Blocks of the VAR."""
    precision: str = "bf16"
    """"bf16" (autocast) or "no" (float32)."""
    seed: int = 0
    """Of scenes, weights and training."""
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
        chroma_gain=3.5,
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


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, sample, read, and write `report.html`, `results.json` and the checkpoints below `config.output`.

    Interrupted and called again with the same settings, training goes on where it stopped.

    Returns:
        the figures of `results.json`.
    """
    for name in ("tokenizer_steps", "var_steps", "subject_steps", "scenes", "width", "depth"):
        if getattr(config, name) < 1:
            raise ValueError(f"demo: {name}: expected at least 1, got {getattr(config, name)}")
    if config.samples < 8:
        raise ValueError(f"demo: samples: expected at least 8, got {config.samples}")
    config.sampling.check()
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    size = tuple(4 * side for side in ScaleSchedule.parse(config.grids).finest)
    scenes = HandwritingScenes(length=config.scenes, size=size, digits=DIGITS, split="train", seed=config.seed)
    held_out = HandwritingScenes(length=config.samples, size=size, digits=DIGITS, split="test", seed=config.seed)
    start = time.perf_counter()
    reader = Reader(cache=output / "reader.safetensors")
    seconds["reader"] = time.perf_counter() - start

    tokenizer: VQTokenizer = _train_tokenizer(config, scenes, held_out).model
    seconds["tokenizer"] = _training_seconds(output / "tokenizer")
    start = time.perf_counter()
    tokens = TokenDataset(scenes, tokenizer, reference=True)
    seconds["tokens"] = time.perf_counter() - start
    var: VAR = _train_var(config, VAR(var_config(config, tokenizer), tokenizer), tokens, held_out, "var").model
    seconds["var"] = _training_seconds(output / "var")
    with_subject = var.add_subject("block_causal")
    subject_var: VAR = _train_var(config, with_subject, tokens, held_out, "var-subject").model
    seconds["var-subject"] = _training_seconds(output / "var-subject")

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
    seconds["evaluation"] = time.perf_counter() - start
    results = {
        "scores": {name: score.summary() for name, score in scores.items()},
        "subject_match": match.summary(),
        "chance_word_accuracy": 10.0**-DIGITS,
        "seconds": seconds,
        "seconds_in_all": sum(seconds.values()),
        "threads": torch.get_num_threads(),
        "parameters": {
            "tokenizer": sum(p.numel() for p in tokenizer.parameters()),
            "var": sum(p.numel() for p in var.parameters()),
        },
    }
    write_json(output / "results.json", results)
    _report(config, scores, match, shown, tokenizer, results).write(output / "report.html")
    return results


def _training_seconds(folder: Path) -> float:
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"]


def _train_tokenizer(config: DemoConfig, scenes: HandwritingScenes, held_out: HandwritingScenes) -> TrainResult:
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
    return train(task, scenes, options, config.output / "tokenizer")


def _train_var(
    config: DemoConfig, model: VAR, tokens: TokenDataset, held_out: HandwritingScenes, name: str
) -> TrainResult:
    torch.manual_seed(config.seed)
    with_subject = model.config.subject != "none"
    options = TrainConfig(
        steps=config.subject_steps if with_subject else config.var_steps,
        batch_size=32,
        learning_rate=3e-3,
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

    return train(VARTask(model, picture), tokens, options, config.output / name)


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
