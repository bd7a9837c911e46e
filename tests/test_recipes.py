"""Recipes: their files, the command that runs them, and the table it writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvar.cli import command_of, main
from fastvar.cli.recipe import Recipe, _plan, intervals, table_text
from fastvar.cli.reinforcement import RL, Evaluate
from fastvar.ranges import check_fields
from tests.helpers.policies import policy

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(path.name for path in RECIPES.glob("*.toml"))
SMALL = ("grpo_for_var.toml", "vmr_grpo.toml", "dreamvar.toml")


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", FILES)
def test_commands_of_the_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step is a command with options that it has and values that it takes."""
    recipe = Recipe.read(RECIPES / name)
    given = [f"{what}=somewhere" for what in recipe.inputs]
    for arguments in ([], ["--small"]) if name in SMALL else ([],):
        inputs = [] if arguments or not given else ["--inputs", *given]
        run("recipe", RECIPES / name, "--output", tmp_path / "out", "--show", *arguments, *inputs)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastvar ")]
        assert len(lines) > 1
    steps = [*recipe.steps, *(Recipe.read(RECIPES / name, small=True).steps if name in SMALL else ())]
    for step in steps:
        places = dict.fromkeys((*recipe.inputs, "output", "base", "recipes"), "somewhere")
        command = command_of(step.arguments(places))
        check_fields(command)
        assert isinstance(command, Evaluate) == bool(step.column)
        if isinstance(command, RL):  # what is held out is only seen by evaluations
            assert command.rl.evaluate_every or not command.scoring.held_out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("small", [True, False])
def test_before_and_after_are_alike(small: bool) -> None:
    """But for the model they are the same evaluations."""
    for name in SMALL:
        steps = Recipe.read(RECIPES / name, small=small).steps
        columns = [[step for step in steps if step.column == column] for column in ("before", "after")]
        for before, after in zip(*columns, strict=True):
            assert before.options.pop("model") != after.options.pop("model") and before.options == after.options


def test_benchmarks_of_the_papers() -> None:
    wanted = {"grpo_for_var.toml": ["prompts", "fid"], "vmr_grpo.toml": ["cvtg-2k"], "dreamvar.toml": ["dreambench"]}
    for name, benchmarks in wanted.items():
        steps = Recipe.read(RECIPES / name).steps
        assert [step.options["benchmark"] for step in steps if "benchmark" in step.options] == benchmarks * 2
    lines = [line for path in (RECIPES / "styles").glob("*.txt") for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted((RECIPES / "styles.txt").read_text().splitlines())


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A recipe of a policy of a few thousand weights."""
    policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n")
    common = 'prompt-file = "{recipes}/prompts.txt"\nrewards = ["jpeg"]'
    path = tmp_path / "toy.toml"
    path.write_text(
        f"""
title = "Toy"
inputs = {{ policy = "a folder" }}
[[steps]]
name = "before"
command = "evaluate"
column = "before"
[steps.options]
model = "{{policy}}"
samples = 8
{common}
[[steps]]
name = "rl"
command = "rl"
[steps.options]
model = "{{policy}}"
output = "{{output}}/rl"
iterations = 1
prompts = 2
group-size = 2
middle = 0
{common}
[[steps]]
name = "after"
command = "evaluate"
column = "after"
[steps.options]
model = "{{output}}/rl"
samples = 8
{common}
"""
    )
    return path


def test_steps_run_once(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other; again, nothing is done twice but what changed, and what follows it."""
    output = toy.parent / "out"
    arguments = ["recipe", toy, "--output", output, "--inputs", f"policy={toy.parent / 'policy'}"]
    run(*arguments)
    assert re.findall(r"step (\d) of 3: (\w+)", capsys.readouterr().out) == [
        ("1", "before"),
        ("2", "rl"),
        ("3", "after"),
    ]
    table = json.loads((output / "table.json").read_text())
    figures = table["figures"]["rewards.jpeg"]
    found = json.loads((output / "figures/after.json").read_text())["rewards"]
    assert figures["after"] == {"value": found["jpeg"], "interval_95": found["jpeg_95"]} and set(figures) == {
        "before",
        "after",
    }
    assert set(table["seconds"]) == {"before", "rl", "after"} and "versions" in table["provenance"]
    assert "| rewards.jpeg | " in (output / "table.md").read_text()
    ran: list[str] = []
    for kind in (Evaluate, RL):
        monkeypatch.setattr(kind, "run", lambda self: ran.append(type(self).__name__))
    run(*arguments)
    assert ran == []
    toy.write_text(toy.read_text().replace("iterations = 1", "iterations = 2"))
    run(*arguments)
    assert ran == ["RL", "Evaluate"]


def test_a_benchmark_is_in_the_table(toy: Path) -> None:
    """Its figures under its name; of a model that has changed its images are drawn again."""
    (toy.parent / "sets").mkdir()
    (toy.parent / "sets/numbers.txt").write_text("1\n2\n")
    toy.write_text(
        f"""{toy.read_text()}
[[steps]]
name = "sets"
command = "evaluate"
column = "after"
[steps.options]
benchmark = "prompts"
model = "{{output}}/rl"
data = "{{recipes}}/sets"
rewards = ["jpeg"]
"""
    )
    output = toy.parent / "out"
    arguments = ["recipe", toy, "--output", output, "--inputs", f"policy={toy.parent / 'policy'}"]
    run(*arguments)
    found = json.loads((output / "figures/sets/summary.json").read_text())["figures"]
    figures = json.loads((output / "table.json").read_text())["figures"]
    assert figures["prompts.jpeg"] == {"after": {"value": found["jpeg"], "interval_95": found["jpeg_95"]}}
    assert "prompts.categories.numbers.jpeg" in figures and "rewards.jpeg" in figures
    drawn = (output / "figures/sets/images/drawn.json").read_text()
    toy.write_text(toy.read_text().replace("iterations = 1", "iterations = 2"))
    run(*arguments)
    assert (output / "figures/sets/images/drawn.json").read_text() != drawn


def test_changed_training_starts_anew(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it is asked to; otherwise a run is not thrown away."""
    output = toy.parent / "out"
    arguments = ["recipe", toy, "--output", output, "--inputs", f"policy={toy.parent / 'policy'}"]
    run(*arguments)
    toy.write_text(toy.read_text().replace("middle = 0", "middle = 0\nlearning-rate = 1e-3"))
    assert "start anew with --no-resume" in refused(capsys, *arguments)
    run(*arguments, "--no-resume")
    assert re.findall(r"step \d of 3: (\w+)", capsys.readouterr().out) == ["rl", "after"]
    assert json.loads((output / "rl/settings.json").read_text())["rl"]["learning_rate"] == 1e-3


def test_an_interrupted_recipe_goes_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = toy.parent / "out"
    arguments = ["recipe", toy, "--output", output, "--inputs", f"policy={toy.parent / 'policy'}"]
    own = RL.run
    monkeypatch.setattr(RL, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run(*arguments)
    assert list(json.loads((output / "steps.json").read_text())) == ["before"] and not (output / "table.json").exists()
    monkeypatch.setattr(RL, "run", own)
    run(*arguments)
    assert (output / "table.md").is_file()


def test_other_processes_wait_for_the_first(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take part in training alone; an evaluation and the record of a step are the first process's."""
    output, ran, waited = toy.parent / "out", list[str](), list[str]()
    arguments = ["recipe", toy, "--output", output, "--inputs", f"policy={toy.parent / 'policy'}"]
    for kind in (Evaluate, RL):
        monkeypatch.setattr(kind, "run", lambda self: ran.append(type(self).__name__))
    places = {"policy": str(toy.parent / "policy")}
    plan = list(_plan(toy, Recipe.read(toy), output, output, places))

    def first_process(seconds: float) -> None:
        waited.append(plan[len(waited)].step.name)
        plan[len(waited) - 1].record(1.0)

    monkeypatch.setattr("fastvar.cli.recipe.time.sleep", first_process)
    monkeypatch.setenv("RANK", "1")
    run(*arguments)
    assert ran == ["RL"] and waited == ["before", "rl", "after"] and not (output / "table.json").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is run."""
    recipe = ["recipe", toy, "--output", toy.parent / "out"]
    assert "missing: policy (a folder)" in refused(capsys, *recipe)
    assert "expected policy=PATH, got policy=a other=b" in refused(capsys, *recipe, "--inputs", "policy=a", "other=b")
    text, inputs = toy.read_text(), ["--inputs", "policy=somewhere"]
    for old, new, message in (
        ("iterations = 1", "iterations = 0", "iterations: expected at least 1, got 0"),
        ("{output}/rl", "{nowhere}/rl", "step rl: expected one of policy, output, base, recipes in braces"),
        ('name = "rl"', 'name = "before"', "expected steps of different names"),
        ('title = "Toy"', "", "expected title and steps"),
        ('title = "Toy"', 'title = "', "toy.toml: "),
        ('title = "Toy"', 'title = "Toy"\nmore = 1', "expected title and steps, got"),
    ):
        toy.write_text(text.replace(old, new))
        assert message in refused(capsys, *recipe, *inputs)
    toy.write_text(text.replace("group-size", "size-of-groups"))
    assert "size-of-groups" in refused(capsys, *recipe, *inputs)
    assert not (toy.parent / "out/steps.json").exists()


def test_figures_of_all_depths() -> None:
    found = {
        "a": 1.0,
        "a_95": [0.5, 1.5],
        "b": 2,
        "deep": {"c": None, "c_95": [None, None], "d": {"e": 3.0, "e_95": [2, 4]}},
    }
    assert [name for name, *_ in intervals(found)] == ["a", "deep.c", "deep.d.e"]
    table: dict[str, Any] = {"title": "T", "seconds": {"x": 61.2}, "provenance": {"commit": "abc"}}
    table["figures"] = {"a": {"before": {"value": 1.0, "interval_95": [0.5, 1.5]}}}
    table["figures"]["c"] = {"after": {"value": None, "interval_95": [None, None]}}
    table["figures"]["fid"] = {"after": {"value": 2.0, "interval_95": None}}
    text = table_text(table)
    assert "| fid |  | 2.000 |" in text
    assert (
        "| a | 1.000 (0.500 to 1.500) |  |" in text
        and "| c |  |  |" in text
        and "x 61 s" in text
        and "commit: abc" in text
    )


@pytest.mark.slow
def test_small_recipes_to_the_end(tmp_path: Path) -> None:
    """All on handwriting with a step or two of each command: what begins with one base trains it once."""
    shutil.copytree(RECIPES, tmp_path / "recipes")
    few = {"steps": 2, "iterations": 1, "samples": 8, "prompts": 2, "group-size": 2, "batch-size": 8}
    for path in (tmp_path / "recipes").glob("*.toml"):
        text = path.read_text()
        for name, value in few.items():
            text = re.sub(rf"(?m)^{name} = \d+", f"{name} = {value}", text)
        text = text.replace('data = "handwriting"', 'data = "handwriting"\nscenes = 64')
        text = re.sub(r'(?m)^command = "choose-middle"\n(.*)$', r'command = "choose-middle"\n\1\nprefixes = 2', text)
        path.write_text(
            text.replace(
                'rewards = ["ocr"]\noutput = "{output}/middle', 'rewards = ["colour"]\noutput = "{output}/middle'
            )
        )
    for name in (*SMALL, "small_infinity.toml"):
        output = tmp_path / name
        run("recipe", tmp_path / "recipes" / name, "--output", output, *(["--small"] if name in SMALL else []))
        figures = json.loads((output / "table.json").read_text())["figures"]
        wanted = {"reading.word_accuracy", "reading.ned", "rewards.ocr", "rewards.diversity"}
        assert all(set(figures[figure]) == {"before", "after"} for figure in wanted)
        assert ("subject_match.joint" in figures) == (name == "dreamvar.toml")
    assert set(json.loads((tmp_path / "base/steps.json").read_text())) == {"tokenizer", "var"}
