"""What the recipes take: their models without weights, memory and hours by the cost model, the table in the docs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import recipes
from benchmarks.costs import ARCHITECTURES, GIB
from fastvar.cli.reinforcement import RL
from fastvar.models import VAR, Infinity, InfinityConfig, VARConfig


@pytest.mark.parametrize("name", recipes.NAMES)
def test_what_the_files_say(name: str) -> None:
    """Their hours and memory are those of the cost model, and the cards that they name hold them."""
    recipe = recipes.recipe_of(name)
    found, expected = recipes.cost(recipe), recipe.expected
    assert (expected["gib"], expected["hours"]) == (
        pytest.approx(found.gib, rel=0.01),
        pytest.approx(found.hours, rel=0.01),
    )
    assert found.gib < 0.9 * expected["card"] * 1e9 / GIB


@pytest.mark.parametrize("name", recipes.NAMES)
def test_models_without_weights(name: str) -> None:
    """As the public files have them, with the subject's prefix where there is one."""
    expected = recipes.recipe_of(name).expected
    model = ARCHITECTURES[expected["model"]]
    shape, subject = model.shape, "block_causal" if expected.get("subject") else "none"
    sizes = {"depth": shape.depth, "embed_dim": shape.width, "num_heads": shape.heads, "subject": subject}
    with torch.device("meta"):
        if shape.vocab_size:
            built: VAR | Infinity = VAR(VARConfig(grids=shape.schedule.grids, **sizes))
        else:
            built = Infinity(InfinityConfig(grids=shape.schedule.grids, bits=shape.channels, **sizes))
    count = sum(parameter.numel() for parameter in built.parameters())
    assert count == pytest.approx(model.parameters, rel=1e-3)
    for step in recipes.recipe_of(name).steps:
        if step.command == "rl":
            command = recipes.command(recipes.recipe_of(name), step)
            assert command.rl.middle < len(built.schedule)
            assert command.rl.prompts * command.rl.group_size % expected["gpus"] == 0


def test_adapters_cost_less() -> None:
    """Bytes of a parameter: no reference 4, no moments 8, no gradients 4, no bf16 copies of frozen weights 2."""
    recipe = recipes.recipe_of("one_card")
    model, place = ARCHITECTURES["VAR-d30"], recipes.Cluster(1)
    command: RL = next(recipes.command(recipe, step) for step in recipe.steps if step.name == "rl")
    with_them = recipes.rl_cost(model, place, command, False).gib
    without = recipes.rl_cost(model, place, replace(command, adapter_rank=0), False).gib
    assert (without - with_them) * GIB == pytest.approx(18 * model.parameters, rel=0.05)
    assert with_them * GIB > 8 * model.parameters


def test_adapters_are_counted() -> None:
    from fastvar.rl import add_adapters
    from tests.helpers.tiny import tiny_var

    var = add_adapters(tiny_var(), 3)
    trained = sum(parameter.numel() for parameter in var.parameters() if parameter.requires_grad)
    shape = recipes.ARCHITECTURES["VAR-d30"].shape
    tiny = replace(ARCHITECTURES["VAR-d30"], shape=replace(shape, depth=var.config.depth, width=var.config.embed_dim))
    assert recipes.adapter_parameters(tiny, 3) == trained


def test_a_row_is_of_its_run(tmp_path: Path) -> None:
    """Figures and seconds of the table, commands of both folders in their order; the newest row of a recipe counts."""
    runs = {"base": ["tokenizer", "var"], "vmr_grpo": ["before", "rl"]}
    for folder, names in runs.items():
        (tmp_path / folder).mkdir()
        steps = {name: {"arguments": [folder, name], "known_by": 1, "seconds": 2.0} for name in names}
        (tmp_path / folder / "steps.json").write_text(json.dumps(steps))
    figures = {
        "reading.word_accuracy": {"before": {"value": 0.25, "interval_95": [0.2, 0.3]}, "after": {"value": 0.5}},
        "rewards.ocr": {"before": {"value": 0.125, "interval_95": None}},
    }
    figures["reading.word_accuracy"]["after"]["interval_95"] = [0.4, 0.6]
    facts = {"commit": "0123456789 with changes", "date": "today", "hardware": "a CPU", "versions": "torch"}
    seconds = {"tokenizer": 2.4, "var": 5.0, "before": 1.0, "rl": 7.6}
    made = {"title": "x", "figures": figures, "seconds": seconds, "provenance": facts}
    (tmp_path / "vmr_grpo/table.json").write_text(json.dumps(made))
    row = recipes.row(tmp_path / "vmr_grpo", tmp_path / "base", "others ran too")
    assert row["recipe"] == "vmr_grpo" and row["commit"] == facts["commit"] and row["figures"] == figures
    assert list(row["steps"].items()) == [(name, [at, name]) for at, names in runs.items() for name in names]
    text = recipes.small_table([{**row, "date": "yesterday", "figures": {}}, row])
    assert "| VMR-GRPO | read exactly | 25.0 % (20.0 to 30.0) | 50.0 % (40.0 to 60.0) |\n" in text
    assert "| VMR-GRPO | OCR reward | 0.125 |  |\n" in text and text.count("VMR-GRPO:") == 1
    assert "VMR-GRPO: commit 0123456 with changes, today, a CPU, torch; tokenizer 2 s, var 5 s, before 1 s" in text
    assert text.endswith("rl 8 s; others ran too.\n")


def test_document_has_the_tables() -> None:
    text = recipes.DOCUMENT.read_text()
    assert recipes.with_table(text) == text
