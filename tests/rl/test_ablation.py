"""Ablations: budgets, resuming, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.models import SamplingOptions
from fastvar.rl import RLConfig
from fastvar.rl.ablation import Ablation, affordable_iterations, iteration_tokens, markdown, run_ablations
from fastvar.schedule import ScaleSchedule
from tests.helpers.policies import GRIDS, policy

SCHEDULE = ScaleSchedule(GRIDS)  # 1 + 4 + 9 tokens
CONFIG = """
model = "policy"
tokens = 3000
seeds = [0, 1]
[base]
prompts = 2
group_size = 4
learning_rate = 1e-3
evaluation_samples = 8
loss = { panw_alpha = 0.6 }
[prompts]
count = 4
[rewards.red]
colour = {}
[rewards.corner]
colour = { region = [0.0, 0.0, 0.3, 0.3], weight = 2.0 }
jpeg = { weight = 0.0 }
base = { use_mask = true }
tokens = 2500
[variants]
vanilla = { middle = 0, loss = { panw_alpha = 0.0 } }
vmr = { middle = 2 }
masked = { middle = 2, use_mask = true, only = ["corner"] }
"""


def test_tokens_of_an_iteration() -> None:
    config = RLConfig(prompts=2, group_size=4, middle=2, continuations=3, coarse_updates=1, fine_updates=1)
    assert iteration_tokens(config, SCHEDULE, 0) == 8 * 5 + 24 * 9 + 3 * 8 * 5
    assert iteration_tokens(config, SCHEDULE, 1) == 2 * 5 + 8 * 9 + 3 * 8 * 14
    by_reference = replace(config, continue_with="reference")
    assert iteration_tokens(by_reference, SCHEDULE, 0) == 2 * 8 * 5 + 24 * 9 + 3 * 8 * 5
    assert iteration_tokens(by_reference, SCHEDULE, 1) == iteration_tokens(config, SCHEDULE, 1)
    plain = RLConfig(prompts=2, group_size=4, middle=0, updates=2, rollout=SamplingOptions(guidance=1.0))
    assert iteration_tokens(plain, SCHEDULE, 0) == 2 * 8 * 14 + 3 * 2 * 8 * 14
    assert affordable_iterations(plain, SCHEDULE, 2 * iteration_tokens(plain, SCHEDULE, 0)) == 2
    assert affordable_iterations(plain, SCHEDULE, 1) == 1


def test_run_and_resume(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "table.toml").write_text(CONFIG)
    table = Ablation.read(tmp_path / "table.toml")
    assert table.settings("red", "vanilla", 3).loss.panw_alpha == 0.0
    assert table.settings("corner", "vmr", 3).use_mask and table.settings("corner", "vmr", 3).loss.panw_alpha == 0.6
    text = run_ablations(tmp_path / "table.toml", tmp_path / "out", only=["red"])
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for seed in (0, 1) for variant in ("vanilla", "vmr")
    ]
    assert all(0.6 * 3000 < row["tokens"] <= 3000 for row in rows)
    assert text == markdown(rows) and "| vmr |" in text
    (tmp_path / "table.toml").write_text(CONFIG.replace("tokens = 3000", "tokens = 4000"))
    with pytest.raises(ValueError, match="red, vanilla, seed 0 with other settings"):
        run_ablations(tmp_path / "table.toml", tmp_path / "out")
    (tmp_path / "table.toml").write_text(CONFIG)
    again = run_ablations(tmp_path / "table.toml", tmp_path / "out")
    later = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert later[: len(rows)] == rows and len(later) == 10 and "### corner" in again
    assert all(row["tokens"] <= 3000 == row["budget"] for row in rows)
    for row in later[4:]:
        assert 0.6 * 2500 < row["tokens"] <= 2500 == row["budget"]
        assert set(row["scores_after"]) == {"colour", "jpeg"}
        assert row["after"] == pytest.approx(2 * row["scores_after"]["colour"], abs=1e-4)
    assert "| colour | jpeg | diversity kept |" in again


def test_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(CONFIG.replace("group_size = 4", "group_sise = 4"))
    with pytest.raises(ValueError, match="expected fields of RLConfig, got 'group_sise'"):
        Ablation.read(path)
    path.write_text(CONFIG.replace("tokens = 3000", ""))
    with pytest.raises(ValueError, match="ablate: config: expected the entries"):
        Ablation.read(path)
    for before, after, message in (
        ("seeds = [0, 1]", "seeds = 3", r"table\.toml: seeds: expected tuple\[int, \.\.\.\], got 3"),
        ("middle = 2 }", 'middle = "two" }', r"RLConfig: middle: expected int, got 'two'"),
        ("loss = { panw_alpha = 0.0 }", "loss = 3", "RLConfig: loss: expected PolicyLossOptions, got 3"),
        ("seeds = [0, 1]", "seeds = [0, 1", r"table\.toml: "),
    ):
        path.write_text(CONFIG.replace(before, after))
        with pytest.raises(ValueError, match=f"ablate: config: .*{message}"):
            Ablation.read(path)
    path.write_text(CONFIG.replace("tokens = 3000", "tokens = 3000.0"), encoding="utf-8-sig")
    assert isinstance(Ablation.read(path).tokens, int)
    path.write_text(CONFIG, encoding="utf-16")
    with pytest.raises(ValueError, match=r"ablate: config: expected text in UTF-8, got .*table\.toml"):
        Ablation.read(path)
    path.write_text(CONFIG)
    for old, new, message in (
        ("seeds = [0, 1]", "seeds = [0, 4294967296]", "RLConfig: seed: expected 0 to 2147483647, got 4294967296"),
        ("tokens = 2500", "tokens = 0", "ablate: tokens: expected at least 1, got 0"),
        ("jpeg = {", "jpg = {", "create: name: expected one of"),
        ("colour = {}", 'colour = { tint = "red" }', "create: options of 'colour'"),
        ("weight = 2.0", "weight = nan", "ablate: rewards.corner.colour.weight: expected a number, got nan"),
    ):
        path.write_text(CONFIG.replace(old, new))
        with pytest.raises(ValueError, match=message):
            Ablation.read(path)
    policy().save_pretrained(tmp_path / "policy")
    path.write_text(CONFIG.replace("middle = 2, use_mask", "middle = 3, use_mask"))
    with pytest.raises(ValueError, match="ablate: corner, masked: middle: expected below 3, got 3"):
        run_ablations(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before the first run, not at the last
    path.write_text(CONFIG)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.jsonl").write_text('{"seed": 0, "rew')
    with pytest.raises(ValueError, match=r"ablate: output: expected a result on each line, got .*results\.jsonl"):
        run_ablations(path, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"only: expected names out of \('red', 'corner'\), got \['blue'\]"):
        run_ablations(path, tmp_path / "out", only=["blue"])


@pytest.mark.parametrize("name", ["ablations", "subject_rewards"])
def test_tables_in_the_documentation_are_those_of_the_rows(name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    rows = [json.loads(line) for line in (root / "benchmarks" / "data" / f"{name}.jsonl").read_text().splitlines()]
    assert markdown(rows).strip() in (root / "docs" / "ablations.md").read_text()
