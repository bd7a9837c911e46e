"""The demo of a small Infinity: bits of handwriting scenes, predicted from the digit as a text."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from fastvar.evaluation import draw, evaluate_texts, score_reading
from fastvar.files import read_json_object, write_json
from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.handwriting.demo import DemoConfig, going_on, train_config, training_seconds
from fastvar.handwriting.evaluation import every_number
from fastvar.handwriting.reader import Reader
from fastvar.handwriting.report import NED, READING, percent, pictures, reading_labels
from fastvar.models import (
    BSQTokenizer,
    BSQTokenizerConfig,
    CharacterTextEncoder,
    Infinity,
    InfinityConfig,
)
from fastvar.pictures import image_grid
from fastvar.provenance import provenance
from fastvar.random import derive
from fastvar.ranges import check_fields
from fastvar.report import Report, curves
from fastvar.schedule import ScaleSchedule
from fastvar.training import InfinityTask, TokenizerTask, train
from fastvar.training.lock import locked
from fastvar.training.log import read_metrics, say

# One digit of 16 x 16 pixels: what is learned in minutes on a CPU.
DIGITS, GRIDS = 1, ScaleSchedule((1, 2, 4))
TOKENIZER, MODEL, RESULTS, INFINITY_REPORT = "bits", "infinity", "infinity.json", "infinity.html"
_GUIDED, _PLAIN = "samples, guided", "samples, no guidance"
_COOL = "samples, guided, at half the temperature"  # as Infinity's own scripts draw


def infinity_config(config: DemoConfig) -> InfinityConfig:
    """A small Infinity that writes the digit it is told; that is a row, and one for the end of the text."""
    heads = max(config.width // 32, 1)
    return InfinityConfig(
        grids=GRIDS.grids,
        depth=config.depth,
        embed_dim=config.width,
        num_heads=heads,
        bits=config.bits,
        max_scales=len(GRIDS),
        text_channels=64,
        text_length=DIGITS + 1,
        text_encoder="characters-64",
        pool_heads=heads,
        gate_init=1.0,
    )


def bits_config(config: DemoConfig) -> BSQTokenizerConfig:
    """A small tokenizer that halves the resolution twice."""
    return BSQTokenizerConfig(
        grids=GRIDS.grids,
        bits=config.bits,
        channels=16,
        channel_multipliers=(1, 2, 4),
        blocks_per_level=1,
        norm_groups=8,
    )


def run_infinity_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, sample, read, and write `infinity.html`, `infinity.json` and the runs below `config.output`.

    Called again with the same settings, training goes on where it stopped; what a folder has of other settings is made
    anew.

    Returns:
        the figures of `infinity.json`.

    Raises:
        ValueError: settings that make no sense, a folder that another process is using.
    """
    check_fields(config)
    shape = infinity_config(config)  # raises for sizes that do not fit, before anything is trained
    with locked(config.output):
        return _run(config, shape)


def _run(config: DemoConfig, shape: InfinityConfig) -> dict[str, Any]:
    output, made = config.output, provenance()
    size = tuple(4 * side for side in shape.schedule.finest)
    data: dict[str, Any] = {"size": size, "digits": DIGITS, "seed": config.seed}
    scenes = HandwritingScenes(length=config.scenes, split="train", **data)
    shown = HandwritingScenes(length=config.samples, split="test", **data).batch(range(config.samples))
    reader = Reader(cache=output / "reader.safetensors")

    say(f"stage 1 of 3: training the tokenizer, {config.tokenizer_steps} steps")
    torch.manual_seed(derive(config.seed, "weights"))
    task = TokenizerTask(BSQTokenizer(bits_config(config)), shown["image"][:8])
    options = train_config(config, config.tokenizer_steps, weight_decay=0.0)
    tokenizer = going_on(train, task, scenes, options, output / TOKENIZER).model

    say(f"stage 2 of 3: training the Infinity, {config.var_steps} steps")
    torch.manual_seed(derive(config.seed, "weights"))
    guided = config.sampling
    cool = replace(guided, temperature=guided.temperature / 2)
    plain = replace(guided, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0)
    net = Infinity(shape, tokenizer, CharacterTextEncoder(shape.text_channels, max_length=shape.text_length))

    def picture(averaged: Infinity) -> Any:
        return image_grid(draw(averaged, every_number(DIGITS, 32), cool), 8, zoom=2)

    infinity = InfinityTask(net, picture)
    model = going_on(train, infinity, scenes, train_config(config, config.var_steps), output / MODEL).model

    say("stage 3 of 3: drawing and reading samples, and the report")
    start, numbers = time.perf_counter(), every_number(DIGITS, config.samples)
    rebuilt = tokenizer.decode(tokenizer.encode(shown["image"].to(tokenizer.device))).cpu()
    scores = {
        "test scenes": score_reading(shown["image"] * 0.5 + 0.5, shown["text"], reader),
        "their reconstructions": score_reading(rebuilt * 0.5 + 0.5, shown["text"], reader),
        _COOL: evaluate_texts(model, numbers, cool, reader),
        _GUIDED: evaluate_texts(model, numbers, guided, reader),
        _PLAIN: evaluate_texts(model, numbers, plain, reader),
    }
    seconds = {name: training_seconds(output / name) for name in (TOKENIZER, MODEL)}
    seconds["evaluation"] = time.perf_counter() - start
    results: dict[str, Any] = {
        "scores": {name: score.summary() for name, score in scores.items()},
        "chance_word_accuracy": 10.0**-DIGITS,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "parameters": {
            name: sum(p.numel() for p in m.parameters()) for name, m in ((TOKENIZER, tokenizer), (MODEL, net))
        },
        "provenance": made,
    }
    write_json(output / RESULTS, results)
    _write_report(config, scores, results)
    return results


def infinity_headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of `infinity.json`, with 95 % intervals."""
    scores = results["scores"]
    return [
        (f"{name} read exactly", percent(scores[kind]["word_accuracy"], scores[kind]["word_accuracy_95"]))
        for name, kind in (
            ("guided samples at half the temperature", _COOL),
            ("guided samples", _GUIDED),
            ("samples without guidance", _PLAIN),
        )
    ]


def _write_report(config: DemoConfig, scores: dict[str, Any], results: dict[str, Any]) -> None:
    output = config.output
    report = Report("fastvar demo: a small Infinity on real handwriting")
    report.text(
        "A bitwise tokenizer and an Infinity were trained from scratch on scenes composed of scanned digits. Told a "
        "digit, the model writes it."
    )
    rows = {name: score.summary() for name, score in scores.items()}
    if (output / "results.json").is_file():
        before = read_json_object(output / "results.json", "demo: output")["scores"]
        rows |= {f"VAR of this folder: {name}": before[name] for name in (_GUIDED, _PLAIN) if name in before}
    report.table(
        ["images", "read exactly (95 % interval)", "NED"],
        [[name, percent(r["word_accuracy"], r["word_accuracy_95"]), f"{r['ned']:.3f}"] for name, r in rows.items()],
    )
    report.text(f"{READING} {NED} Chance is {100 * results['chance_word_accuracy']:.0f} % read exactly.")
    report.heading("Samples with guidance, at half the temperature")
    shown = scores[_COOL]
    report.gallery(
        [[(image, *label)] for image, label in zip(pictures(shown.images), reading_labels(shown), strict=False)]
    )
    report.heading("Training")
    lines = read_metrics(output / MODEL / "metrics.jsonl")
    report.picture(curves({MODEL: lines}, "bits_right", ylabel="share of bits"), "Bits predicted right", plot=True)
    report.table(["stage", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()])
    report.heading("How this was made")
    report.table(["", ""], list(results["provenance"].items()))
    report.write(output / INFINITY_REPORT)
