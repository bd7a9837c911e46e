"""What recipes take by the cost model, and what their small forms found: the tables of docs/recipes.md.

    python -m benchmarks.recipes                                    # print the costs, write both tables
    fastvar recipe recipes/vmr_grpo.toml --small --output outputs/recipes/vmr_grpo
    python -m benchmarks.recipes --record outputs/recipes/vmr_grpo  # keep a row of that run, then the same

The cost model is that of docs/scaling.md, with its rates and what it leaves out; here it takes its settings from a
recipe's own commands. A row has a run's own figures, seconds, commit, hardware and commands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks import records, report
from benchmarks.cluster import Cluster, Plan, activations, cycle, memory
from benchmarks.costs import ARCHITECTURES, GIB, Architecture, subject, training
from benchmarks.scaling import number, table
from fastvar.cli import command_of
from fastvar.cli.models import Train
from fastvar.cli.recipe import Recipe, Step
from fastvar.cli.reinforcement import RL
from fastvar.files import write_text

FOLDER = records.ROOT / "recipes"
DOCUMENT = records.ROOT / "docs" / "recipes.md"
DATA = records.ROOT / "benchmarks" / "data" / "recipes.jsonl"
NAMES = ("grpo_for_var", "vmr_grpo", "dreamvar", "one_card")


@dataclass(frozen=True)
class Cost:
    """Of a recipe.

    Attributes:
        gib: the most that a GPU holds, rewards and text encoders left out.
        hours: at least, evaluations left out.
    """

    gib: float
    hours: float


def recipe_of(name: str) -> Recipe:
    return Recipe.read(FOLDER / f"{name}.toml")


def command(recipe: Recipe, step: Step) -> Any:
    """A step's command; what a user has to bring is somewhere."""
    return command_of(step.arguments(dict.fromkeys((*recipe.inputs, "output", "base", "recipes"), "somewhere")))


def cost(recipe: Recipe) -> Cost:
    """By the settings of its steps that `expected` names."""
    expected = recipe.expected
    model, place = ARCHITECTURES[expected["model"]], Cluster(expected["gpus"], expected["sharded"])
    steps = {step.name: command(recipe, step) for step in recipe.steps}
    with_subject = expected.get("subject", False)
    costs = [rl_cost(model, place, steps[name], with_subject) for name in expected["rl"]]
    costs += [train_cost(model, place, steps[name], with_subject) for name in expected.get("train", [])]
    return Cost(max(one.gib for one in costs), sum(one.hours for one in costs))


def rl_cost(model: Architecture, place: Cluster, command: RL, with_subject: bool) -> Cost:
    """Of reinforcement learning. A rollout of all scales at once counts as one of the fine segment behind a coarse one
    of the first scale."""
    config = command.rl
    segments = config.prompts * config.group_size // place.gpus
    plan = Plan(
        segments=segments,
        group=config.group_size,
        continuations=config.continuations if config.middle else 1,
        guided=config.rollout.guidance is not None,
        coarse_updates=config.coarse_updates if config.middle else 0,
        micro_batch=config.micro_batch or segments,
        chunk=config.rollout.batch_size,
        checkpointing=config.gradient_checkpointing,
    )
    model = replace(model, middle=config.middle or 1)
    parts = memory(model, plan, place)
    adapters = adapter_parameters(model, command.adapter_rank)
    if adapters:  # the reference is the policy without them; frozen weights become bf16 a layer at a time
        halves = 2.0 * model.block_parameters
        parts = parts._replace(
            optimizer=8.0 * adapters, gradients=4.0 * adapters, copies=parts.copies / 2, halves=halves
        )
    prefixes = -(-segments // config.group_size) if with_subject else 0
    if with_subject:  # one group's at a time
        saved = activations(model, plan.micro_batch + 1, plan.checkpointing)
        parts = parts._replace(activations=saved, sampling=parts.sampling + model.cache_bytes * model.tokens)
    seconds = cycle(model, plan, place).total / (plan.coarse_updates + 1)
    if with_subject:
        seconds += subject(model, segments * model.tokens, prefixes).seconds + more(model, segments, prefixes)
    return Cost(parts.peak / GIB, config.iterations * seconds / 3600)


def train_cost(model: Architecture, place: Cluster, command: Train, with_subject: bool) -> Cost:
    """Of supervised training, the tokenizer's encoder left out; each target has a prefix of its own."""
    rows = command.train.batch_size // command.train.accumulate
    plan = Plan(segments=command.train.batch_size, micro_batch=rows, checkpointing=command.gradient_checkpointing)
    parts = memory(model, plan, place)  # without a reference, and nothing is drawn but pictures
    streams = 2 if with_subject else 1
    saved = activations(model, streams * rows, plan.checkpointing)
    parts = parts._replace(copies=parts.copies / 2, activations=saved, sampling=0.0)
    prefixes = rows if with_subject else 0
    once = sum(job.seconds for job in training(model, rows, model.scales, plan.checkpointing, prefixes))
    return Cost(parts.peak / GIB, command.train.steps * command.train.accumulate * once / 3600)


def more(model: Architecture, rows: float, prefixes: float) -> float:
    """Seconds that prefixes add to an update."""
    with_them, without = (
        sum(job.seconds for job in training(model, rows, model.scales, True, n)) for n in (prefixes, 0.0)
    )
    return with_them - without


def adapter_parameters(model: Architecture, rank: int) -> int:
    """Of low-rank adapters on a VAR's blocks: queries, keys and values, projection, and both layers of the MLP."""
    width = model.shape.width
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return rank * model.shape.depth * sum(map(sum, sizes))


def lines() -> Iterator[tuple[str, ...]]:
    for name in NAMES:
        recipe, expected = recipe_of(name), recipe_of(name).expected
        found = cost(recipe)
        layout = "FSDP2" if expected["sharded"] else "DDP" if expected["gpus"] > 1 else "adapters"
        yield (
            f"`{name}`",
            expected["model"],
            f"{expected['gpus']}, {layout}",
            number(found.gib),
            number(found.hours),
        )


SMALL = {
    "grpo_for_var": "GRPO for VAR",
    "vmr_grpo": "VMR-GRPO",
    "small_infinity": "VMR-GRPO of bits",
    "dreamvar": "DreamVAR",
}
FIGURES = {  # of the small experiments, and which of them are shares
    "reading.word_accuracy": ("read exactly", True),
    "reading.ned": ("NED", False),
    "rewards.ocr": ("OCR reward", False),
    "rewards.colour": ("redness", False),
    "rewards.held_out/jpeg": ("minus kilobytes of a JPEG, not trained", False),
    "rewards.subject": ("likeness to the subject", False),
    "subject_match.shape": ("own reference nearest of eight, by shape", True),
    "subject_match.ink": ("by ink", True),
    "rewards.diversity": ("diversity", False),
}


def row(folder: Path, base: Path, note: str = "") -> dict[str, Any]:
    """What a run of a recipe found, from its table and its steps; the recipe is the one that its folder is called by.

    Raises:
        OSError: a recipe that has not run to its end.
        ValueError: a folder of another name.
    """
    if folder.name not in SMALL:
        raise ValueError(f"record: expected a folder called {', '.join(SMALL)}, got {folder}")
    made = json.loads((folder / "table.json").read_text())
    steps = {  # of the base first, as they ran
        name: step["arguments"] for place in (base, folder) for name, step in _steps(place).items()
    }
    return {
        "benchmark": "recipe",
        "recipe": folder.name,
        **made["provenance"],
        "note": note,
        "seconds": made["seconds"],
        "figures": made["figures"],
        "steps": {name: steps[name] for name in made["seconds"]},
    }


def _steps(folder: Path) -> dict[str, Any]:
    path = folder / "steps.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def small_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each figure of the newest row of each recipe, and under it on what and when that was measured."""
    newest = {row["recipe"]: row for row in rows}
    named = {name: newest[name] for name in SMALL if name in newest}
    cells = [
        (SMALL[name], label, *(_cell(row["figures"][key].get(column), share) for column in ("before", "after")))
        for name, row in named.items()
        for key, (label, share) in FIGURES.items()
        if key in row["figures"]
    ]
    notes = [
        f"{SMALL[name]}: commit {row['commit'][:7]}{' with changes' if 'changes' in row['commit'] else ''}, "
        f"{row['date']}, {row['hardware']}, {row['versions']}; "
        f"{', '.join(f'{step} {taken:.0f} s' for step, taken in row['seconds'].items())}"
        f"{f'; {note}' if (note := row['note']) else ''}.\n"
        for name, row in named.items()
    ]
    return "\n".join([table(["recipe", "figure", "before", "after"], cells), *notes])


def _cell(found: Mapping[str, Any] | None, share: bool) -> str:
    if found is None or found["value"] is None:
        return ""
    numbers = [found["value"], *(found["interval_95"] or ())]
    value, *interval = (f"{100 * number:.1f}" if share else f"{number:.3f}" for number in numbers)
    return f"{value}{' %' if share else ''}{' ({} to {})'.format(*interval) if interval else ''}"


def with_table(text: str) -> str:
    """A text with both tables put between their markers."""
    text = report.between(text, "costs", table(["recipe", "model", "GPUs", "GiB on each", "hours, at least"], lines()))
    return report.between(text, "small", small_table(records.read(DATA)))


def main(record: Path | None = None, base: Path | None = None, note: str = "") -> None:
    """Print the costs and write the tables.

    Args:
        record: folder of a run of a small recipe, called by its name, of which a row is kept first.
        base: folder of what it began with; "base" beside it by default.
        note: what else is to be said of the run.
    """
    if record is not None:
        records.append(DATA, row(record, base or record.parent / "base", note))
    for name in NAMES:
        print(name, cost(recipe_of(name)))
    if DOCUMENT.is_file():
        write_text(DOCUMENT, with_table(DOCUMENT.read_text()))


if __name__ == "__main__":
    tyro.cli(main)
