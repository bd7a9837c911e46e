"""The suite of VMR-GRPO's savings: what is measured on a GPU runs at tiny size, and the large models can be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.runner import Options, Runner
from benchmarks.suites.vmr_grpo_step import CASES, SUITE, Job, make_policy

ON_GPU = SUITE.settings["gpu"]


def test_every_saving_is_measured_on_a_gpu() -> None:
    assert {setting["case"] for setting in ON_GPU} == set(CASES)
    assert {setting["model"] for setting in ON_GPU} == {"VAR-d16", "VAR-d30"}


@pytest.mark.parametrize("setting", ON_GPU, ids=lambda setting: f"{setting['model']} {setting['case']}")
def test_settings_run_at_tiny_size(setting: Any) -> None:
    """With the groups and the dtype of the GPU's: both contenders are right."""
    tiny = {**setting, "model": "tiny", "middle": 2, "group_size": 4, "size": "tiny"}
    checked = Runner(Options(torch.device("cpu"))).check(SUITE, tiny, "forward")
    assert set(checked.errors) == {"fastvar", "without"} and not checked.failed
    assert max(checked.errors.values()) <= checked.limit


@pytest.mark.parametrize(("model", "billions"), [("VAR-d16", 0.31), ("VAR-d30", 2.0)])
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
