"""The demo: tokenizer and VAR on handwriting scenes, a reference subject, rewards, and a report of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch

from fastvar.evaluation import GUIDED, ReadingScore, draw, evaluate_texts, score_reading
from fastvar.files import write_json
from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.handwriting.evaluation import evaluate_subject, every_number
from fastvar.handwriting.reader import Reader
from fastvar.handwriting.report import write_report
from fastvar.models import VAR, SamplingOptions, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.pictures import image_grid
from fastvar.provenance import provenance
from fastvar.random import derive
from fastvar.ranges import Count, CountOrNone, OneOf, Range, Seed, check_fields
from fastvar.rl import Evaluation, PolicyLossOptions, Prompts, RLConfig, VMRGRPOTrainer, evaluate_policy
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
    model: Annotated[str, OneOf("var", "infinity")] = "var"
    """What to train: a "var", with all that can be shown of it, or an "infinity", which is read alone. Their folders,
    figures and reports have names of their own, so that one output folder can hold both."""
    tokenizer_steps: Count = 900
    """Steps of the tokenizer."""
    var_steps: Count = 2000
    """Steps of the VAR without a subject, or of the Infinity."""
    subject_steps: Count = 350
    """VAR: steps of fine-tuning with the subject prefix."""
    rl_iterations: CountOrNone = 200
    """VAR: rollouts of reinforcement learning with the OCR reward; 0 for none."""
    scenes: Count = 16000
    """Training scenes."""
    samples: Annotated[int, Range(8)] = 400
    """Images per evaluation."""
    grids: str = "1,2,3x4,6x8"
    """VAR: token grids; the images are four times the finest one."""
    vocab_size: Count = 256
    """VAR: entries of the codebook."""
    bits: Count = 16
    """Infinity: bits of a token."""
    width: Count = 128
    """Width of the residual stream."""
    depth: Count = 4
    """Blocks of the transformer."""
    precision: Annotated[str, OneOf("auto", "no", "bf16")] = "auto"
    """"no" (float32), "bf16" (autocast) or "auto" (bf16 where the hardware computes in it, else float32)."""
    seed: Seed = 0
    """Seed of scenes, weights and training."""
    sampling: SamplingOptions = GUIDED


DIGITS = 2
CANDIDATES = 8


class Stages:
    """Says which stage begins and how long all that are left take: as in a recorded run with the defaults on two cores
    (last row of benchmarks/data/demo.jsonl in round numbers), at the pace of those that are done."""

    def __init__(self, config: DemoConfig) -> None:
        default = DemoConfig()

        def share(name: str) -> float:
            return getattr(config, name) / getattr(default, name)

        stages = {
            "reader": ("fitting the reader of digits", 3.0),
            "tokenizer": (f"training the tokenizer, {config.tokenizer_steps} steps", 85 * share("tokenizer_steps")),
            "tokens": (f"encoding {config.scenes} scenes", 10 * share("scenes")),
            "var": (f"training the VAR, {config.var_steps} steps", 223 * share("var_steps")),
            "var-subject": (
                f"training it with a reference subject, {config.subject_steps} steps",
                80 * share("subject_steps"),
            ),
            "rl": (f"learning from rewards, {config.rl_iterations} rollouts", 102 * share("rl_iterations")),
            "evaluation": ("drawing and reading samples, and the report", 10 * share("samples")),
        }
        if not config.rl_iterations:
            del stages["rl"]
        self._titles = {name: title for name, (title, _) in stages.items()}
        self._expected = {name: seconds for name, (_, seconds) in stages.items()}

    def begin(self, name: str, seconds: dict[str, float]) -> None:
        """Say that a stage begins; `seconds` holds those of the stages before it."""
        trusted = 10.0  # so that the first stage, a short one, does not set the pace of all others
        pace = (trusted + sum(seconds.values())) / (trusted + sum(self._expected[done] for done in seconds))
        left = pace * sum(expected for stage, expected in self._expected.items() if stage not in seconds)
        number = list(self._titles).index(name) + 1
        say(f"stage {number} of {len(self._titles)}: {self._titles[name]}; {_about(left)} left of all stages")


def _about(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes} minute{'s' if minutes > 1 else ''}"


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

    Says on standard error which stage begins and how long all that are left take.

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
    made = provenance()  # now, as the checkout may be another one at the end
    stages, seconds = Stages(config), dict[str, float]()
    size = tuple(4 * side for side in ScaleSchedule.parse(config.grids).finest)
    data: dict[str, Any] = {"size": size, "digits": DIGITS, "seed": config.seed, "reference_place": "scene"}
    scenes = HandwritingScenes(length=config.scenes, split="train", **data)
    held_out = HandwritingScenes(length=config.samples, split="test", **data)
    stages.begin("reader", seconds)
    start = time.perf_counter()
    reader = Reader(cache=output / "reader.safetensors")
    seconds["reader"] = time.perf_counter() - start

    stages.begin("tokenizer", seconds)
    tokenizer = _train_tokenizer(config, scenes, held_out).model
    seconds["tokenizer"] = training_seconds(output / "tokenizer")
    stages.begin("tokens", seconds)
    start = time.perf_counter()
    tokens = TokenDataset(scenes, tokenizer, reference=True)
    seconds["tokens"] = time.perf_counter() - start
    stages.begin("var", seconds)
    var = _train_var(config, VAR(var_config(config), tokenizer), tokens, held_out, "var").model
    seconds["var"] = training_seconds(output / "var")
    stages.begin("var-subject", seconds)
    with_subject = var.add_subject("block_causal")
    subject_var = _train_var(config, with_subject, tokens, held_out, "var-subject").model
    seconds["var-subject"] = training_seconds(output / "var-subject")
    policy = None
    if config.rl_iterations:
        stages.begin("rl", seconds)
        policy = _train_policy(config, var, reader)
        seconds["rl"] = training_seconds(output / "rl")

    stages.begin("evaluation", seconds)
    start = time.perf_counter()
    shown = held_out.batch(list(range(len(held_out))))
    drawn = Drawn.by(var, reader, config.samples)
    learned = Learned(drawn, Drawn.by(policy, reader, config.samples), config.rl_iterations) if policy else None
    scores = {
        "test scenes": score_reading(shown["image"] * 0.5 + 0.5, shown["text"], reader),
        "their reconstructions": score_reading(
            tokenizer.decode(tokenizer.encode(shown["image"])) * 0.5 + 0.5, shown["text"], reader
        ),
        "samples, guided": evaluate_texts(var, every_number(DIGITS, config.samples), config.sampling, reader),
        "samples, no guidance": drawn.read,
    }
    if learned:
        scores["samples, no guidance, after rewards"] = learned.after.read
    scores["samples with a subject"], match = evaluate_subject(
        subject_var, held_out, config.sampling, reader, candidates=CANDIDATES
    )
    seconds["evaluation"] = time.perf_counter() - start
    results: dict[str, Any] = {
        "scores": {name: score.summary() for name, score in scores.items()},
        "subject_match": match,
        "chance_word_accuracy": 10.0**-DIGITS,
        "seconds": seconds,
        "seconds_in_all": sum(seconds.values()),
        "threads": torch.get_num_threads(),
        "parameters": {
            "tokenizer": sum(p.numel() for p in tokenizer.parameters()),
            "var": sum(p.numel() for p in var.parameters()),
        },
        "provenance": made,
    }
    if learned:
        results["rl"] = learned.summary()
    write_json(output / "results.json", results)
    write_report(config, scores, learned, shown, results)
    return results


def training_seconds(folder: Path) -> float:
    """What a run has taken in all."""
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"]


def train_config(config: DemoConfig, steps: int, **changes: Any) -> TrainConfig:
    """How all models of the demo are trained."""
    return TrainConfig(
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.99,
        precision=config.precision,
        save_every=100,
        picture_every=200,
        seed=config.seed,
        **changes,
    )


def _train_tokenizer(
    config: DemoConfig, scenes: HandwritingScenes, held_out: HandwritingScenes
) -> TrainResult[VQTokenizer]:
    torch.manual_seed(derive(config.seed, "weights"))
    task = TokenizerTask(
        VQTokenizer(tokenizer_config(config)), held_out.batch(list(range(min(8, len(held_out)))))["image"]
    )
    options = train_config(config, config.tokenizer_steps, weight_decay=0.0)
    return going_on(train, task, scenes, options, config.output / "tokenizer")


def _train_var(
    config: DemoConfig, model: VAR, tokens: TokenDataset, held_out: HandwritingScenes, name: str
) -> TrainResult[VAR]:
    torch.manual_seed(derive(config.seed, "weights"))
    with_subject = model.config.subject != "none"
    options = train_config(config, config.subject_steps if with_subject else config.var_steps)
    shown = held_out.batch(list(range(min(32, len(held_out)))))

    def picture(averaged: VAR) -> Image:
        if not with_subject:
            return image_grid(draw(averaged, every_number(DIGITS, 32), config.sampling), 8, zoom=2)
        subject = averaged.pyramid(averaged.tokenizer.encode(shown["reference"].to(averaged.device)))
        images = draw(averaged, shown["text"], config.sampling, subject=subject)
        return _pairs(shown["reference"] * 0.5 + 0.5, images)

    return going_on(train, VARTask(model, picture), tokens, options, config.output / name)


def going_on(run: Callable[..., _T], *arguments: Any) -> _T:
    """A run, whose last two arguments are its settings and its folder; anew where the folder has one of other settings:
    a demo is never a mixture."""
    *others, settings, folder = arguments
    try:
        return run(*others, settings, folder)
    except OtherSettingsError:
        say(f"{folder} was made with other settings, and is made anew")
        return run(*others, replace(settings, resume=False), folder)


@dataclass(frozen=True)
class Drawn:
    """What a policy draws with fixed seeds, four images of each of 100 numbers, without guidance."""

    evaluation: Evaluation
    read: ReadingScore

    @classmethod
    def by(cls, var: VAR, reader: Reader, samples: int) -> Drawn:
        prompts = Prompts(every_number(DIGITS, 100))
        reward = RewardSum({"ocr": OCRReward(reader)})
        evaluation = evaluate_policy(var, reward, prompts, samples=samples, options=SamplingOptions())
        return cls(evaluation, score_reading(evaluation.images, evaluation.prompts.texts, reader))


@dataclass(frozen=True)
class Learned:
    """The same model drawn before and after so many rollouts of learning from rewards."""

    before: Drawn
    after: Drawn
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
        loss=PolicyLossOptions(kl_weight=0.1),
    )


def _train_policy(config: DemoConfig, var: VAR, reader: Reader) -> VAR:
    reward = RewardSum({"ocr": OCRReward(reader)})

    def learn(settings: RLConfig, folder: Path) -> VAR:
        policy = var.clone().requires_grad_(True)
        return VMRGRPOTrainer(policy, reward, every_number(DIGITS, 100), settings, folder).train()

    return going_on(learn, rl_config(config), config.output / "rl")


def _pairs(left: torch.Tensor, right: torch.Tensor) -> Image:
    """Two sets of images side by side, four pairs a row."""
    return image_grid(torch.stack([left, right], 1).flatten(0, 1), 8, zoom=2)
