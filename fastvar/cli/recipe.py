"""Recipes: files of commands that make an experiment, run one after the other, and a table of what they found."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import tyro

from fastvar.cli.outputs import output_folder, say
from fastvar.files import read_json_object, read_text, write_json, write_text
from fastvar.provenance import provenance
from fastvar.ranges import check_fields
from fastvar.training.lock import locked

_DONE = "steps.json"
_SHARED = ("train-tokenizer", "train", "rl")  # what several processes do together; all else the first one does alone


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: in its recipe.
        command: of fastvar.
        options: of the command, by name; of texts {output}, {base} and the recipe's inputs are replaced.
        column: of the table, "before" or "after", that the figures of an evaluation or a benchmark belong to; "" for
            none.
    """

    name: str
    command: str
    options: dict[str, Any]
    column: str = ""

    def arguments(self, places: Mapping[str, str]) -> list[str]:
        """Of the command line.

        Raises:
            ValueError: an option that names an input which is not given.
        """
        arguments = [self.command]
        options = dict(self.options)
        if self.column:
            options["output"] = str(self._figures(Path("{output}")))
        for name, value in options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                items = value if isinstance(value, list) else [value]
                arguments += [f"--{flag}", *(_filled(self.name, str(item), places) for item in items)]
        return arguments

    def found(self, output: Path) -> dict[str, Any]:
        """Its figures; those of a benchmark under its name."""
        place = self._figures(output)
        if "benchmark" not in self.options:
            return read_json_object(place, "recipe")
        return {self.options["benchmark"]: read_json_object(place / "summary.json", "recipe")["figures"]}

    def clear(self, output: Path) -> None:
        """Remove a benchmark's images, which another model may have drawn."""
        if "benchmark" in self.options:
            shutil.rmtree(self._figures(output), ignore_errors=True)

    def _figures(self, output: Path) -> Path:
        return output / "figures" / (self.name if "benchmark" in self.options else f"{self.name}.json")


@dataclass(frozen=True)
class Recipe:
    """What a file says.

    Attributes:
        title: of the table.
        steps: of the whole experiment.
        inputs: what a user has to bring, by name, and what that is.
        base: a recipe of models that the experiment begins with, beside this one's file; "" for none.
        small: the same with what needs no download and runs on a CPU in minutes; a table with "steps" and "base".
        expected: what the experiment takes by the cost model, for people; see docs/recipes.md.
    """

    title: str
    steps: tuple[Step, ...]
    inputs: dict[str, str] = field(default_factory=dict)
    base: str = ""
    small: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, small: bool = False) -> Recipe:
        """From a TOML file; the small experiment has no inputs.

        Raises:
            ValueError, OSError: another file, an entry that is missing or unknown.
        """
        try:
            content = tomllib.loads(read_text(path, "recipe: file"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"recipe: file: {path}: {error}") from error
        if small:
            content = {**content, "inputs": {}, "base": "", **content.get("small", {})}
            content["title"] = f"{content.get('title')}, small"
        try:
            steps = tuple(Step(**step) for step in content.pop("steps"))
            recipe = cls(steps=steps, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"recipe: file: {path}: expected title and steps, got {error}") from error
        names = [step.name for step in recipe.steps]
        if len(set(names)) < len(names) or any(step.column not in ("", "before", "after") for step in recipe.steps):
            raise ValueError(
                f"recipe: file: {path}: expected steps of different names in the column before, after or none"
            )
        return recipe


class Planned(NamedTuple):
    """A step as it is to be run.

    Attributes:
        step: of the recipe or of its base.
        folder: of the two's outputs.
        arguments: of the command line.
        known_by: a checksum of its arguments and of those of all steps before it. What is done is known by it: where an
            early step changes, all that follow are run again.
    """

    step: Step
    folder: Path
    arguments: list[str]
    known_by: int

    @property
    def done(self) -> bool:
        return self.recorded and _records(self.folder)[self.step.name]["known_by"] == self.known_by

    @property
    def recorded(self) -> bool:
        """Whether it is done, perhaps with other options."""
        return self.step.name in _records(self.folder)

    def record(self, seconds: float) -> None:
        """That it is done."""
        own = {"arguments": self.arguments, "known_by": self.known_by, "seconds": round(seconds, 1)}
        write_json(self.folder / _DONE, {**_records(self.folder), self.step.name: own})


@dataclass(frozen=True)
class RunRecipe:
    """Run the steps of a recipe, commands of fastvar, one after the other, and write a table of figures before and
    after. Called again, it goes on where it stopped."""

    file: tyro.conf.Positional[Path]
    """A TOML file such as recipes/vmr_grpo.toml."""
    output: Path
    """Folder of the steps' runs, of figures, table.json and table.md."""
    small: bool = False
    """The same on a small model with data that comes with fastvar: minutes on a CPU."""
    base: Path | None = None
    """Folder of the models that the recipe begins with, which several recipes may share; by default "base" beside the
    output."""
    inputs: tuple[str, ...] = ()
    """What the recipe asks for, as NAME=PATH; it says what in its file."""
    resume: bool = True
    """Let training that was stopped, or that has changed, go on from its last checkpoint; what has other settings than
    its checkpoint is refused. With --no-resume every step that is not done starts anew, over what its folder has."""
    show: bool = False
    """Only print the commands."""

    def run(self) -> None:
        recipe = Recipe.read(self.file, small=self.small)
        base = self.base or self.output.parent / "base"
        plan = [*_plan(self.file, recipe, self.output, base, self._given(recipe))]
        if self.show:
            for planned in plan:
                print(f"# {planned.step.name}\nfastvar {shlex.join(planned.arguments)}")
            return
        from fastvar.cli import command_of

        for folder in (self.output, base):
            output_folder("output", folder)
        anew = [] if self.resume else ["--no-resume"]
        commands = [  # all are checked before the first is run
            command_of([*planned.arguments, *(anew if planned.step.command in _SHARED else [])]) for planned in plan
        ]
        for command in commands:
            check_fields(command)
        main = os.environ.get("RANK", "0") == "0"
        with locked(self.output, active=main):
            made = provenance()
            for number, (planned, command) in enumerate(zip(plan, commands, strict=True), 1):
                if planned.done:
                    continue
                say(f"step {number} of {len(plan)}: {planned.step.name}")
                start = time.perf_counter()
                if main and (planned.recorded or not self.resume):
                    planned.step.clear(planned.folder)
                if main or planned.step.command in _SHARED:
                    command.run()
                while not main and not planned.done:
                    time.sleep(1)  # where the first process fails, its launcher ends the others
                if main:
                    planned.record(time.perf_counter() - start)
            if main:
                self._table(recipe, plan, made)

    def _given(self, recipe: Recipe) -> dict[str, str]:
        """The inputs by name.

        Raises:
            ValueError: one that is missing, unknown or no NAME=PATH.
        """
        given = {name: path for name, _, path in (item.partition("=") for item in self.inputs)}
        problems = [f"{name} ({what})" for name, what in recipe.inputs.items() if not given.get(name)]
        if problems or set(given) - set(recipe.inputs):
            expected = " ".join(f"{name}=PATH" for name in recipe.inputs) or "none"
            raise ValueError(
                f"recipe: inputs: expected {expected}, got {' '.join(self.inputs) or 'none'}; missing: "
                f"{', '.join(problems) or 'nothing'}"
            )
        return given

    def _table(self, recipe: Recipe, plan: list[Planned], made: dict[str, str]) -> None:
        figures: dict[str, dict[str, Any]] = {}
        for step in recipe.steps:
            if step.column:
                for name, value, interval in intervals(step.found(self.output)):
                    figures.setdefault(name, {})[step.column] = {"value": value, "interval_95": interval}
        seconds = {step.name: _records(folder)[step.name]["seconds"] for step, folder, *_ in plan}
        table = {"title": recipe.title, "figures": figures, "seconds": seconds, "provenance": made}
        write_json(self.output / "table.json", table)
        text = table_text(table)
        write_text(self.output / "table.md", text)
        say(text)


def _records(folder: Path) -> dict[str, Any]:
    """What a folder's steps were and took, by name."""
    return read_json_object(folder / _DONE, "recipe") if (folder / _DONE).is_file() else {}


def intervals(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and 95 % interval of every figure X beside which there is an X_95, in depth: "reading.ned"."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from intervals(value, f"{prefix}{name}.")
        elif f"{name}_95" in figures:
            yield f"{prefix}{name}", value, figures[f"{name}_95"]


def table_text(table: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = [f"# {table['title']}", "", "| | before | after |", "| --- | --- | --- |"]
    for name, columns in table["figures"].items():
        cells = [_cell(columns.get(column)) for column in ("before", "after")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in table["seconds"].items())
    facts = [f"{name}: {value}" for name, value in table["provenance"].items()]
    return "\n".join([*lines, "", "In brackets 95 % intervals.", "", f"Steps: {seconds}.", "", *facts, ""])


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    if found["interval_95"] is None:
        return f"{found['value']:.3f}"
    low, high = ("?" if bound is None else f"{bound:.3f}" for bound in found["interval_95"])
    return f"{found['value']:.3f} ({low} to {high})"


def _plan(file: Path, recipe: Recipe, output: Path, base: Path, inputs: Mapping[str, str]) -> Iterator[Planned]:
    """Every step, those of the base first."""
    steps = [(step, base) for step in Recipe.read(file.parent / recipe.base).steps] if recipe.base else []
    known_by = 0
    for step, folder in [*steps, *((step, output) for step in recipe.steps)]:
        places = {**inputs, "output": str(folder), "base": str(base), "recipes": str(file.parent)}
        arguments = step.arguments(places)
        known_by = crc32(json.dumps(arguments).encode(), known_by)
        yield Planned(step, folder, arguments, known_by)


def _filled(step: str, text: str, places: Mapping[str, str]) -> str:
    def place(match: re.Match[str]) -> str:
        if match[1] not in places:
            raise ValueError(f"recipe: step {step}: expected one of {', '.join(places)} in braces, got {text!r}")
        return places[match[1]]

    return re.sub(r"\{(\w+)\}", place, text)
