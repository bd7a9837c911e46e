"""Ablations: variants of the trainer on equal budgets of network tokens, several seeds each, resumable."""

from __future__ import annotations

import itertools
import json
import math
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fastvar.builtin import PROMPTS
from fastvar.files import json_text, read_text, write_text
from fastvar.models import VAR
from fastvar.pictures import save_picture
from fastvar.provenance import provenance
from fastvar.ranges import Range, check_value, fitted
from fastvar.rl.config import RLConfig
from fastvar.rl.prompts import PromptSource
from fastvar.rl.rewards import RewardSum, check_options, create
from fastvar.rl.trainer import VMRGRPOTrainer
from fastvar.schedule import ScaleSchedule
from fastvar.training.log import read_metrics

if TYPE_CHECKING:
    from PIL.Image import Image

_BACKWARD = 3  # a training pass in units of a forward pass: one forward, two of the same size backward


@dataclass(frozen=True)
class Ablation:
    """A table of runs.

    Attributes:
        model: folder of the policy to start from; relative to the TOML file unless absolute.
        tokens: each run's budget: tokens that pass the network, those of a training pass counted three times.
        seeds: of the runs.
        base: settings of all variants, fields of `RLConfig`; nested ones as tables.
        rewards: by name, the weighted rewards that are summed: {registered name: {"weight": 1, options of it}}; one of
            weight 0 is measured only. "base" among them changes settings for this sum, "tokens" its runs' budget.
        prompts: options of the source of prompts, `count` among them.
        variants: by name, what they change; "only" among it names the sums of rewards that a variant is run for.
    """

    model: Path
    tokens: int
    seeds: tuple[int, ...]
    base: dict[str, Any]
    prompts: dict[str, Any]
    rewards: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Ablation:
        """From a TOML file.

        Raises:
            ValueError: a missing or unknown entry.
        """
        try:
            content = tomllib.loads(read_text(path, "ablate: config"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"ablate: config: {path}: {error}") from error
        names = {f.name for f in fields(cls)}
        if set(content) != names:
            raise ValueError(f"ablate: config: expected the entries {sorted(names)}, got {sorted(content)}")
        try:
            content = {name: fitted(cls, name, value) for name, value in content.items()}
        except ValueError as error:
            raise ValueError(f"ablate: config: {path}: {error}") from error
        table = cls(**content | {"model": path.parent / content["model"]})
        for seed, reward, variant in itertools.product(table.seeds, table.rewards, table.variants):
            table.settings(reward, variant, seed).check()
        for reward in table.rewards:
            check_value("ablate", "tokens", table.budget(reward), int, Range(1))
            weights, terms = table.terms(reward)
            for name, options in terms.items():
                check_options(name, options)
                check_value("ablate", f"rewards.{reward}.{name}.weight", weights[name], float, Range())
        return table

    def runs(self, only: Sequence[str] = ()) -> Iterator[tuple[int, str, str]]:
        """Seed, sum of rewards and variant of every run; seed by seed, so that a table which is stopped early is whole
        for fewer seeds."""
        for seed, reward, variant in itertools.product(self.seeds, only or self.rewards, self.variants):
            if reward in self.variants[variant].get("only", [reward]):
                yield seed, reward, variant

    def settings(self, reward: str, variant: str, seed: int) -> RLConfig:
        """The settings of a run, without its number of iterations."""
        config = RLConfig(seed=seed)
        for changes in (self.base, self.rewards[reward].get("base", {}), self.variants[variant]):
            config = changed(config, {name: value for name, value in changes.items() if name != "only"})
        return config

    def budget(self, reward: str) -> int:
        """Tokens of each run with a sum of rewards."""
        return self.rewards[reward].get("tokens", self.tokens)

    def terms(self, reward: str) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Weights and options of the rewards in a sum, by name."""
        terms = {name: dict(own) for name, own in self.rewards[reward].items() if name not in ("base", "tokens")}
        return {name: own.pop("weight", 1.0) for name, own in terms.items()}, terms


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of nested dataclasses with some fields changed.

    Raises:
        ValueError: a field that is not there.
    """
    for name, value in changes.items():
        if name not in {f.name for f in fields(config)}:
            raise ValueError(f"ablate: config: expected fields of {type(config).__name__}, got {name!r}")
        old = getattr(config, name)
        if is_dataclass(old) and isinstance(value, Mapping):
            new = changed(old, value)
        else:
            try:
                new = fitted(type(config), name, value)
            except ValueError as error:
                raise ValueError(f"ablate: config: {type(config).__name__}: {error}") from error
        config = replace(config, **{name: new})
    return config


def iteration_tokens(config: RLConfig, schedule: ScaleSchedule, iteration: int) -> int:
    """Tokens that pass the network in an iteration, in forward passes."""
    rows = config.prompts * config.group_size
    whole = schedule.num_tokens
    segment = config.segment(iteration)
    if segment == "whole":
        drawn, trained = rows * whole, rows * whole
    else:
        coarse = schedule.ends[config.middle - 1]
        if segment == "coarse":
            read = 2 if config.reference_continues else 1  # by the reference too, which continues from them
            drawn, trained = read * rows * coarse + rows * config.continuations * (whole - coarse), rows * coarse
        else:
            drawn, trained = config.prompts * coarse + rows * (whole - coarse), rows * whole
    return drawn * (2 if config.rollout.guides(VAR) else 1) + _BACKWARD * config.updates * trained


def affordable_iterations(config: RLConfig, schedule: ScaleSchedule, tokens: int) -> int:
    """How many iterations a budget pays for, at least 1."""
    spent = itertools.accumulate(iteration_tokens(config, schedule, i) for i in itertools.count())
    return max(sum(1 for _ in itertools.takewhile(lambda total: total <= tokens, spent)), 1)


def run_ablations(path: Path, output: Path, *, only: Sequence[str] = (), source: PromptSource | None = None) -> str:
    """Run what is missing and write `results.jsonl` (a line for each run), `table.md` and `plot.png` into `output`.

    Args:
        path: the TOML file.
        output: folder; runs that it has are not run again, an interrupted one goes on.
        only: names of rewards; all by default.
        source: makes the prompts of training and of evaluations; `fastvar.builtin.PROMPTS` by default.

    Returns:
        the table as Markdown.

    Raises:
        ValueError: a file or names that make no sense.
    """
    table = Ablation.read(path)
    unknown = sorted(set(only) - set(table.rewards))
    if unknown:
        raise ValueError(f"ablate: only: expected names out of {tuple(table.rewards)}, got {unknown}")
    scales = len(VAR.from_pretrained(table.model).schedule)
    for seed, reward, variant in table.runs(only):
        middle = table.settings(reward, variant, seed).middle
        if middle >= scales:
            raise ValueError(f"ablate: {reward}, {variant}: middle: expected below {scales}, got {middle}")
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    lines = read_text(results, "ablate: output").splitlines() if results.is_file() else []
    try:
        rows = [json.loads(line) for line in lines]
        done = {(row["seed"], row["reward"], row["variant"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ablate: output: expected a result on each line, got {results} ({error!r})") from error
    for seed, reward, variant in table.runs(only):
        row = done.get((seed, reward, variant))
        if row is not None:
            settings = json.loads(json_text(table.settings(reward, variant, seed).settings()))
            if row["settings"] != settings or row.get("budget", table.tokens) != table.budget(reward):
                raise ValueError(
                    f"ablate: output: {results} has {reward}, {variant}, seed {seed} with other settings; "
                    "choose another folder"
                )
            continue
        folder = output / "runs" / f"{reward}-{variant}-{seed}"
        rows.append(_run(table, reward, variant, seed, folder, source or resolve_name(PROMPTS)))
        write_text(results, "".join(json_text(row) + "\n" for row in rows))
    text = markdown(rows)
    write_text(output / "table.md", text)
    save_picture(plot(rows), output / "plot.png")
    return text


def _run(table: Ablation, reward: str, variant: str, seed: int, output: Path, source: PromptSource) -> dict[str, Any]:
    var = VAR.from_pretrained(table.model)
    config = table.settings(reward, variant, seed)
    iterations = affordable_iterations(config, var.schedule, table.budget(reward))
    often = max(iterations // 10, 1)
    config = replace(config, iterations=iterations, evaluate_every=iterations, save_every=often, keep=1)
    weights, terms = table.terms(reward)
    rewards = RewardSum({name: create(name, **options) for name, options in terms.items()}, weights)
    prompts = source(var, split="train", **table.prompts)
    held_out = source(var, split="test", **table.prompts)
    start = time.perf_counter()
    VMRGRPOTrainer(var, rewards, prompts, config, output, evaluation=held_out).train()
    lines = read_metrics(output / "metrics.jsonl")
    before, after = lines[0], lines[-1]
    spent = sum(iteration_tokens(config, var.schedule, i) for i in range(iterations))
    return {
        "reward": reward,
        "variant": variant,
        "seed": seed,
        "before": before["evaluation/return"],
        "after": after["evaluation/return"],
        "scores_before": {name: before[f"evaluation/{name}"] for name in terms},
        "scores_after": {name: after[f"evaluation/{name}"] for name in terms},
        "diversity_before": before["evaluation/diversity"],
        "diversity_after": after["evaluation/diversity"],
        "iterations": iterations,
        "tokens": spent,
        "budget": table.budget(reward),
        "seconds": round(time.perf_counter() - start, 1),
        "settings": json.loads(json_text(config.settings())),
        "device": str(var.device),
        **provenance(),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each sum of rewards: how much it rose, what became of each reward in it, and the share of the
    diversity kept; means over seeds and 95 % intervals (Student's t)."""
    parts = []
    for reward in dict.fromkeys(row["reward"] for row in rows):
        own = [row for row in rows if row["reward"] == reward]
        terms = list(own[0].get("scores_before", ()))
        terms = terms if len(terms) > 1 else []
        starts = [f"{term} {fmean(row['scores_before'][term] for row in own):.3f}" for term in terms]
        before = ", ".join([f"{fmean(row['before'] for row in own):.3f}", *starts])
        head = ["variant", "iterations", "rise", "95 % interval", *terms, "diversity kept", "seeds"]
        parts += [f"### {reward}", "", f"Before: {before}.", "", *_line(head), "|" + " --- |" * len(head)]
        for variant in dict.fromkeys(row["variant"] for row in own):
            runs = [row for row in own if row["variant"] == variant]
            rises = [row["after"] - row["before"] for row in runs]
            low, high = student_interval(rises)
            changes = [fmean(row["scores_after"][t] - row["scores_before"][t] for row in runs) for t in terms]
            kept = fmean(row["diversity_after"] / row["diversity_before"] for row in runs)
            cells = [variant, str(runs[0]["iterations"]), f"{fmean(rises):+.3f}", f"{low:+.3f} to {high:+.3f}"]
            parts += _line([*cells, *(f"{c:+.3f}" for c in changes), f"{100 * kept:.0f} %", str(len(runs))])
        parts.append("")
    return "\n".join(parts)


def plot(rows: Sequence[Mapping[str, Any]]) -> Image:
    """A panel for each sum of rewards: the rise of each variant, mean and 95 % interval over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as pil

    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(3 + 3 * len(rewards), 1.2 + 0.28 * len(variants)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rewards), sharey=True, squeeze=False)[0]
    for axes, reward in zip(panels, rewards, strict=True):
        for place, variant in enumerate(variants):
            runs = [row for row in rows if (row["reward"], row["variant"]) == (reward, variant)]
            rises = [row["after"] - row["before"] for row in runs]
            if rises:
                low, high = student_interval(rises)
                error = None if math.isnan(low) else (high - low) / 2
                axes.errorbar(fmean(rises), place, xerr=error, fmt="o", capsize=3, color="C0")
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(reward)
        axes.set_xlabel("rise of the reward")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].invert_yaxis()
    canvas.draw()
    return pil.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _line(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of a few values, by Student's t; nan of less than two."""
    from scipy.stats import t

    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half
