"""The suite of VMR-GRPO's savings: what is measured on a GPU runs at tiny size, and the large models can be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.runner import Options, Runner
from benchmarks.suites.training_step import Step, logits_loss
from benchmarks.suites.vmr_grpo_step import CASES, SUITE, Job, make_policy
from tests.helpers.tape import recordings

ON_GPU = SUITE.settings["gpu"]


def test_every_saving_is_measured_on_a_gpu() -> None:
    assert {setting["case"] for setting in ON_GPU} == set(CASES)
    assert {setting["model"] for setting in ON_GPU} == {"VAR-d16", "VAR-d30", "Infinity-2B-0.06M"}


@pytest.mark.parametrize("setting", ON_GPU, ids=lambda setting: f"{setting['model']} {setting['case']}")
def test_settings_run_at_tiny_size(setting: Any) -> None:
    """With the groups and the dtype of the GPU's: both contenders are right."""
    model = {"model": "Infinity-tiny", "grids": "1,2,3x4"} if "Infinity" in setting["model"] else {"model": "tiny"}
    tiny = {**setting, **model, "middle": 2, "group_size": 4, "size": "tiny"}
    checked = Runner(Options(torch.device("cpu"))).check(SUITE, tiny, "forward")
    assert set(checked.errors) == {"fastvar", "without"} and not checked.failed
    assert max(checked.errors.values()) <= checked.limit


@pytest.mark.parametrize(("model", "billions"), [("VAR-d16", 0.31), ("VAR-d30", 2.0), ("Infinity-2B-0.06M", 2.2)])
def test_memory_of_the_weights(model: str, billions: float) -> None:
    with torch.device("meta"):
        var = make_policy({"model": model, "size": "gpu"})
    assert sum(p.numel() for p in var.parameters() if p.requires_grad) / 1e9 == pytest.approx(billions, rel=0.1)


def test_precision_of_the_check() -> None:
    for dtype, precision in (("bfloat16", "high"), ("float32", "highest")):
        tiny = {"model": "tiny", "middle": 2, "prompts": 1, "group_size": 2, "dtype": dtype, "size": "tiny"}
        job, before = Job(tiny, torch.device("cpu")), torch.get_float32_matmul_precision()
        with job.exact():
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == before


def test_an_update_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are its own: another contender's update between two of its own changes neither."""
    found = recordings(monkeypatch)
    tiny = {"model": "tiny", "middle": 2, "prompts": 2, "group_size": 2, "dtype": "bfloat16", "size": "tiny"}
    job = Job(tiny, torch.device("cpu"))
    rollout, advantages = job.draw(job.subjects, "whole"), torch.randn(4)
    expected = job.update(rollout, advantages, parts=2)
    for _ in range(4):
        torch.testing.assert_close(job.update(rollout, advantages, parts=2, graphs=True), expected, rtol=0, atol=0)
        torch.testing.assert_close(job.update(rollout, advantages, parts=2), expected, rtol=0, atol=0)
    assert len(found) == 1


def test_a_step_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recordings(monkeypatch)
    var = make_policy({"grids": "1,2,3", "depth": 2, "width": 64, "size": "tiny"})
    optimizer = torch.optim.AdamW(var.parameters(), lr=0.0)
    steps = [Step(var, logits_loss(var), optimizer, clip_norm=1.0, graphs=graphs) for graphs in (False, True)]
    inputs = {"tokens": torch.randint(var.config.vocab_size, (2, 14)), "labels": torch.arange(2)}
    for _ in range(4):
        torch.manual_seed(0)
        plain = steps[0](**inputs)
        torch.manual_seed(0)
        torch.testing.assert_close(steps[1](**inputs), plain, rtol=0, atol=0)
    assert len(found) == 1
