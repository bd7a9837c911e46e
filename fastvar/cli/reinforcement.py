"""Commands that score images and learn from the scores."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastvar.cli.benchmarks import BenchmarkOptions
from fastvar.cli.common import DrawnWith, Flat, ModelOptions, device_of_process, train_on
from fastvar.cli.outputs import output_file, output_folder, say
from fastvar.cli.sources import PromptOptions
from fastvar.evaluation import GUIDED
from fastvar.models import SamplingOptions
from fastvar.ranges import Count, CountOrNone, Range, Seed, check_fields
from fastvar.rl.config import RLConfig

if TYPE_CHECKING:
    from fastvar.rl.rewards import RewardSum


@dataclass(frozen=True)
class RewardOptions(PromptOptions):
    """What images are scored by, and what they should show."""

    rewards: tuple[str, ...] = ("ocr",)
    """Names of rewards, each with its weight if that is not 1: "ocr", "clip-t=0.5". There are aesthetic, clip-i,
    clip-t, colour, dino, hpsv2, jpeg, ocr, remote and subject."""
    reward_options: tuple[str, ...] = ()
    """Options of rewards as NAME.OPTION=VALUE, the value as JSON has it or plain text: "clip-t.pretrained=openai"."""
    held_out: tuple[str, ...] = ()
    """Names of rewards that evaluations show and nothing learns from: where the others rise and they fall, those are
    being exploited."""
    standardise: bool = False
    """Subtract each reward's mean over the batch and divide by its standard deviation before weighing."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense, without loading a reward."""
        from fastvar.rl.rewards import check_options

        check_fields(self)
        weights, options = self._parsed()
        for name, weight in weights.items():
            check_options(name, options[name])
            if not math.isfinite(weight):
                raise ValueError(f"rewards: expected finite weights, got {name}={weight}")
        for name in self.held_out:
            check_options(name, options[name])
            if name in weights:
                raise ValueError(f"held_out: expected rewards that are not in rewards, got {name!r}")

    def reward(self) -> RewardSum:
        """The weighted sum."""
        from fastvar.rl.rewards import RewardSum, create

        weights, options = self._parsed()
        rewards, held_out = (
            {name: create(name, **options[name]) for name in names} for names in (weights, self.held_out)
        )
        return RewardSum(rewards, weights, standardise=self.standardise, held_out=held_out)

    def _parsed(self) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Weights and options by the names of rewards."""
        weights = {}
        for item in self.rewards:
            name, _, weight = item.partition("=")
            weights[name] = _number("rewards", item, weight) if weight else 1.0
        options: dict[str, dict[str, Any]] = {name: {} for name in (*weights, *self.held_out)}
        for item in self.reward_options:
            path, equals, value = item.partition("=")
            name, dot, option = path.partition(".")
            if not (equals and dot) or name not in options:
                raise ValueError(
                    f"reward_options: expected NAME.OPTION=VALUE with NAME out of {(*options,)}, got {item!r}"
                )
            options[name][option] = json_or_text(value)
        return weights, options


@dataclass(frozen=True)
class RL:
    """Train a VAR or an Infinity with rewards (VMR-GRPO). An interrupted run goes on with the same command."""

    start: Annotated[ModelOptions, Flat]
    output: Path
    """Folder of the run: model (averaged weights), best, metrics, pictures, checkpoints."""
    scoring: Annotated[RewardOptions, Flat] = field(default_factory=RewardOptions)
    prompt_count: Count = 1000
    """The most prompts, where they are made and not read from a file."""
    adapter_rank: CountOrNone = 0
    """Train low-rank adapters (LoRA) of this rank instead of all weights; the KL is then to the model without them."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""
    rl: Annotated[RLConfig, Flat] = field(default_factory=RLConfig)

    def run(self) -> None:
        from fastvar.rl import VMRGRPOTrainer, add_adapters

        output_folder("output", self.output)
        train_on(self.device)
        # each process moves it to its own device; AdamW needs float32
        model = self.start.load("cpu", read_on=device_of_process(self.device)).float()
        prompts = self.scoring.load_prompts(model, count=self.prompt_count, train=True)
        held_out = None
        if model.config.subject != "none" and self.scoring.prompt_file is None:
            held_out = self.scoring.load_prompts(model, count=self.rl.evaluation_samples, train=False)
        if self.adapter_rank:
            add_adapters(model, self.adapter_rank, seed=self.rl.seed)
        VMRGRPOTrainer(model, self.scoring.reward(), prompts, self.rl, self.output, evaluation=held_out).train()
        say(f"policy: {self.output / 'model'}")


@dataclass(frozen=True)
class ChooseMiddle:
    """Measure for every middle scale m how much of a reward's variance the coarse scales explain, and recommend one."""

    drawn_with: Annotated[ModelOptions, Flat]
    output: Path = Path("middle.png")
    """The plot, a .png."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""
    scoring: Annotated[RewardOptions, Flat] = field(default_factory=RewardOptions)
    prompt_count: Count = 8
    """Prompts, spread over all."""
    prefixes: Annotated[int, Range(2)] = 6
    """Coarse states of each prompt."""
    continuations: Annotated[int, Range(2)] = 8
    """Images that continue each coarse state."""
    averaged_over: Count = 2
    """K, the continuations whose mean is the return in training."""
    rollout: Annotated[SamplingOptions, Flat] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from fastvar.pictures import save_picture
        from fastvar.report import points
        from fastvar.rl.choose_middle import ENOUGH, explained_shares, recommended_middle

        output_file("output", self.output, ".png")
        if self.scoring.held_out:
            raise ValueError(f"choose-middle: held_out: expected none, as nothing learns, got {self.scoring.held_out}")
        model = self.drawn_with.load(self.device)
        prompts = self.scoring.load_prompts(model, count=max(self.prompt_count, 100), train=False)
        prompts = prompts.take([i * len(prompts) // self.prompt_count for i in range(self.prompt_count)])
        shares = explained_shares(
            model,
            self.scoring.reward(),
            prompts,
            prefixes=self.prefixes,
            continuations=self.continuations,
            averaged_over=self.averaged_over,
            options=self.rollout,
        )
        best = recommended_middle(shares)
        for share in shares:
            mark = "  <- recommended" if share.middle == best else ""
            print(f"m = {share.middle}: one image {share.share:.2f}, mean of K {share.averaged:.2f}{mark}")
        lines = {
            "one image": [(share.middle, share.share) for share in shares],
            f"mean of {self.averaged_over}": [(share.middle, share.averaged) for share in shares],
        }
        picture = points(lines, xlabel="middle scale m", ylabel="share of variance explained", level=ENOUGH)
        save_picture(picture, self.output)
        print(self.output)


@dataclass(frozen=True)
class Evaluate:
    """Score samples of a model: rewards and diversity with 95 % intervals. Without a file of prompts also word accuracy
    and NED, and with a subject prefix how often a sample matches its reference. With --benchmark a published benchmark
    instead, of a model's images or of those of a folder."""

    drawn_with: Annotated[DrawnWith, Flat] = field(default_factory=DrawnWith)
    samples: Annotated[int, Range(8)] = 400
    """Images to draw for each part."""
    output: Path | None = None
    """Also write the figures to this JSON file; of a benchmark the folder of all that it makes."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""
    scoring: Annotated[RewardOptions, Flat] = field(default_factory=RewardOptions)
    seed: Seed = 0
    """Seed of the samples that are read."""
    options: Annotated[SamplingOptions, Flat] = GUIDED
    benchmark: Annotated[BenchmarkOptions, Flat] = field(default_factory=BenchmarkOptions)

    def run(self) -> None:
        from fastvar.files import json_text, write_json
        from fastvar.rl import evaluate_policy

        if self.benchmark.benchmark:
            return self.benchmark.run(
                self.drawn_with,
                output=self.output,
                samples=self.samples,
                scoring=self.scoring,
                device=self.device,
                seed=self.seed,
                options=self.options,
            )
        if self.drawn_with.model is None:
            raise ValueError("evaluate: model: expected a folder, got none")
        if self.output is not None:
            output_file("output", self.output)
        var = self.drawn_with.load(self.device)
        reward = self.scoring.reward()
        prompts = self.scoring.load_prompts(var, count=self.samples, train=False)
        figures = self.scoring.figures(var, self.samples, self.options, self.seed)
        scored = evaluate_policy(var, reward, prompts, samples=self.samples, options=self.options)
        figures["rewards"] = {"images": len(scored.images), **scored.metrics}
        figures["rewards"] |= {f"{name}_95": interval for name, interval in scored.intervals.items()}
        figures["reward_descriptions"] = reward.descriptions()
        print(json_text(figures, indent=2))
        if self.output is not None:
            write_json(self.output, figures)


@dataclass(frozen=True)
class Ablate:
    """Run a table of variants on equal budgets, several seeds each, and write results as JSON lines. What is there
    already is not run again."""

    config: Path
    """A TOML file such as benchmarks/ablations.toml."""
    output: Path
    """Folder of the results, runs and figures."""
    only: tuple[str, ...] = ()
    """Names of the rewards to run; all by default."""

    def run(self) -> None:
        from fastvar.rl.ablation import run_ablations
        from fastvar.training.lock import locked

        output_folder("output", self.output)
        with locked(self.output):
            say(run_ablations(self.config, self.output, only=self.only))


def _number(option: str, item: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: expected NAME or NAME=WEIGHT, got {item!r}") from None


def json_or_text(text: str) -> Any:
    """A value as JSON has it, or else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
