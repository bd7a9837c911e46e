"""The demo: tokenizer and VAR on handwriting scenes, a reference subject, rewards, and a report of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
from fastvar.pictures import image_grid
from fastvar.ranges import Count, CountOrNone, OneOf, Range, Seed, check_fields
from fastvar.report import Report, curves, points
from fastvar.rl import Evaluation, LossOptions, Prompts, RLConfig, RolloutOptions, VMRGRPOTrainer, evaluate_policy
from fastvar.rl.rewards import OCRReward, RewardSum
from fastvar.schedule import ScaleSchedule
from fastvar.training import TokenDataset, TokenizerTask, TrainConfig, TrainResult, VARTask, train
from fastvar.training.lock import locked
from fastvar.training.log import read_metrics, say
from fastvar.training.settings import OtherSettingsError

if TYPE_CHECKING:
    from PIL.Image import Image


_T = TypeVar("_T")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take under ten minutes on two cores."""

    output: Path = Path("outputs/demo")
    """Folder of the report, the figures and the runs."""
    tokenizer_steps: Count = 900
    """Steps of the tokenizer."""
    var_steps: Count = 2000
    """Steps of the VAR without a subject."""
    subject_steps: Count = 350
    """Steps of fine-tuning with the subject prefix."""
    rl_iterations: CountOrNone = 200
    """Rollouts of reinforcement learning with the OCR reward; 0 for none."""
    scenes: Count = 16000
    """Training scenes."""
    samples: Annotated[int, Range(8)] = 400
    """Images per evaluation."""
    grids: str = "1,2,3x4,6x8"
    """Token grids; the images are four times the finest one."""
    vocab_size: Count = 256
    """Entries of the codebook."""
    width: Count = 128
    """Width of the VAR's residual stream."""
    depth: Count = 4
    """Blocks of the VAR."""
    precision: Annotated[str, OneOf("auto", "no", "bf16")] = "auto"
    """"no" (float32), "bf16" (autocast) or "auto" (bf16 where the hardware computes in it, else float32)."""
    seed: Seed = 0
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


def var_config(config: DemoConfig) -> VARConfig:
    """A small VAR that writes the number it is told."""
    tokenizer = tokenizer_config(config)
    return VARConfig(
        grids=tokenizer.grids,
        depth=config.depth,
        embed_dim=config.width,
        num_heads=max(config.width // 32, 1),
        vocab_size=tokenizer.vocab_size,
        code_channels=tokenizer.code_channels,
        num_classes=0,
        text_length=DIGITS,
        gate_init=1.0,
    )


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, sample, read, and write `report.html`, `results.json` and the checkpoints below `config.output`.

    Interrupted and called again with the same settings, training goes on where it stopped. What a folder has of other
    settings is made anew.

    Returns:
        the figures of `results.json`.

    Raises:
        ValueError: settings that make no sense, a folder that another process is using.
    """
    check_fields(config)
    var_config(config)  # raises for sizes that do not fit, before anything is trained
    with locked(config.output):
        return _run(config)


def _run(config: DemoConfig) -> dict[str, Any]:
    output = config.output
    seconds: dict[str, float] = {}
    size = tuple(4 * side for side in ScaleSchedule.parse(config.grids).finest)
    data: dict[str, Any] = {"size": size, "digits": DIGITS, "seed": config.seed, "reference_place": "scene"}
    scenes = HandwritingScenes(length=config.scenes, split="train", **data)
    held_out = HandwritingScenes(length=config.samples, split="test", **data)
    start = time.perf_counter()
    reader = Reader(cache=output / "reader.safetensors")
    seconds["reader"] = time.perf_counter() - start

    tokenizer = _train_tokenizer(config, scenes, held_out).model
    seconds["tokenizer"] = _training_seconds(output / "tokenizer")
    start = time.perf_counter()
    tokens = TokenDataset(scenes, tokenizer, reference=True)
    seconds["tokens"] = time.perf_counter() - start
    var = _train_var(config, VAR(var_config(config), tokenizer), tokens, held_out, "var").model
    seconds["var"] = _training_seconds(output / "var")
    with_subject = var.add_subject("block_causal")
    subject_var = _train_var(config, with_subject, tokens, held_out, "var-subject").model
    seconds["var-subject"] = _training_seconds(output / "var-subject")

    learned = _train_policy(config, var, reader) if config.rl_iterations else None
    if learned:
        seconds["rl"] = learned.seconds

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
    results: dict[str, Any] = {
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
    if learned:
        scores |= {"samples before rewards": learned.before.read, "samples after rewards": learned.after.read}
        results["scores"] |= {name: score.summary() for name, score in scores.items()}
        results["rl"] = learned.summary()
    write_json(output / "results.json", results)
    report = _report(config, scores, match, shown, tokenizer, results)
    if learned:
        _report_policy(report, learned, output)
    report.write(output / "report.html")
    return results


def _training_seconds(folder: Path) -> float:
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"]


def _train_tokenizer(
    config: DemoConfig, scenes: HandwritingScenes, held_out: HandwritingScenes
) -> TrainResult[VQTokenizer]:
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
    return _going_on(train, task, scenes, options, config.output / "tokenizer")


def _train_var(
    config: DemoConfig, model: VAR, tokens: TokenDataset, held_out: HandwritingScenes, name: str
) -> TrainResult[VAR]:
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

    return _going_on(train, VARTask(model, picture), tokens, options, config.output / name)


def _going_on(run: Callable[..., _T], *arguments: Any) -> _T:
    """A run, whose last two arguments are its settings and its folder; anew where the folder has one of other settings:
    a demo is never a mixture."""
    *others, settings, folder = arguments
    try:
        return run(*others, settings, folder)
    except OtherSettingsError:
        say(f"{folder} was made with other settings, and is made anew")
        return run(*others, replace(settings, resume=False), folder)


@dataclass(frozen=True)
class _Drawn:
    """What a policy draws with fixed seeds, four images of each of 100 numbers, without guidance."""

    evaluation: Evaluation
    read: ReadingScore

    @classmethod
    def by(cls, var: VAR, reader: Reader, samples: int) -> _Drawn:
        prompts = Prompts(every_number(DIGITS, 100))
        reward = RewardSum({"ocr": OCRReward(reader)})
        found = evaluate_policy(var, reward, prompts, samples=samples, options=RolloutOptions())
        return cls(found, score_reading(found.images, found.prompts.texts, reader))


@dataclass(frozen=True)
class _Learned:
    before: _Drawn
    after: _Drawn
    seconds: float
    iterations: int

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        diversities = [drawn.evaluation.metrics["diversity"] for drawn in (self.before, self.after)]
        return {
            "iterations": self.iterations,
            "word_accuracy_rise": self.after.read.accuracy - self.before.read.accuracy,
            "ocr": [drawn.evaluation.metrics["ocr"] for drawn in (self.before, self.after)],
            "diversity": diversities,
            "diversity_95": [drawn.evaluation.intervals["diversity"] for drawn in (self.before, self.after)],
            "diversity_kept": diversities[1] / diversities[0],
        }


def rl_config(config: DemoConfig) -> RLConfig:
    """Only the fine segment is trained, groups sharing their coarse state: layout and colours of an image are then no
    cause of reward, so that learning to write clearly does not cost variety."""
    return RLConfig(
        iterations=config.rl_iterations,
        prompts=8,
        group_size=8,
        middle=min(2, len(ScaleSchedule.parse(config.grids)) - 1),
        coarse_updates=0,
        fine_updates=1,
        learning_rate=3e-4,
        weight_decay=0.0,
        ema_decay=0.9,
        evaluate_every=50,
        evaluation_samples=160,
        save_every=20,
        seed=config.seed,
        loss=LossOptions(kl_weight=0.1),
    )


def _train_policy(config: DemoConfig, var: VAR, reader: Reader) -> _Learned:
    settings, folder = rl_config(config), config.output / "rl"
    reward = RewardSum({"ocr": OCRReward(reader)})
    before = _Drawn.by(var, reader, config.samples)

    def learn(settings: RLConfig, folder: Path) -> VAR:
        policy = var.clone().requires_grad_(True)
        return VMRGRPOTrainer(policy, reward, every_number(DIGITS, 100), settings, folder).train()

    policy = _going_on(learn, settings, folder)
    return _Learned(before, _Drawn.by(policy, reader, config.samples), _training_seconds(folder), config.rl_iterations)


def _report_policy(report: Report, learned: _Learned, output: Path) -> None:
    before, after = learned.before, learned.after
    report.heading("Learning from rewards")
    report.text(
        f"VMR-GRPO with the OCR reward, {learned.iterations} rollouts of 64 images: the VAR without a subject, sampled "
        "without guidance, learns to write what the reader can read. Seeds of the evaluation are not those of training."
    )
    report.table(
        ["", "read exactly (95 % interval)", "NED", "OCR reward", "diversity"],
        [
            [
                name,
                _percent(drawn.read.accuracy, drawn.read.accuracy_interval),
                f"{drawn.read.similarity:.3f}",
                f"{drawn.evaluation.metrics['ocr']:.3f}",
                f"{drawn.evaluation.metrics['diversity']:.3f}",
            ]
            for name, drawn in (("before", before), ("after", after))
        ],
    )
    report.text(
        "Diversity: root mean square difference of the pixels of two images of the same number. "
        f"{100 * learned.summary()['diversity_kept']:.0f} % of it is kept."
    )
    report.picture(
        _pairs(before.evaluation.images[:64:2], after.evaluation.images[:64:2]),
        "The same seeds before (left) and after (right), of " + ", ".join(before.evaluation.prompts.texts[:64:2]),
    )
    lines = read_metrics(output / "rl" / "metrics.jsonl")
    report.picture(
        points(
            {
                "rollouts": [(line["step"], line["reward/ocr"]) for line in lines if "reward/ocr" in line],
                "evaluation": [(line["step"], line["evaluation/ocr"]) for line in lines if "evaluation/ocr" in line],
            },
            xlabel="rollout",
            ylabel="OCR reward",
        ),
        "OCR reward; from -0.6 (nothing right) to 2",
        plot=True,
    )


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
        "A reference shows one digit of a scene alone on another paper, with the place, size, slant and pen it has "
        "in the scene. Its scan is one that training has not seen; the other references show other scans of the same "
        "digit in other inks, placed, sized and written alike."
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
