"""The runner checks contenders before it times them, and names in the row whoever does not compete."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import Problem, Suite, relative_error, setting_name
from benchmarks.runner import Options, Runner, Wrong
from benchmarks.suites import SUITES

SETTING = {"model": "tiny", "batch": 3, "dtype": "float32", "size": "tiny"}


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def suite(training: bool = True, **contenders: Callable[..., Any] | str) -> Suite:
    def build(setting: Any, device: torch.device) -> Problem:
        x = torch.linspace(0.1, 1, setting["batch"])
        counted = {"flops": 3.0, "bytes": 24.0, "training_flops": 9.0, "training_bytes": 48.0}
        return Problem({"x": x}, dict(contenders), gradients=("x",), reference=square, **counted)

    return Suite("squares", {"tiny": [SETTING]}, tuple(contenders), build, training)


def runner() -> Runner:
    return Runner(Options(torch.device("cpu"), budget=0.0, rounds=(3, 3)))


def test_a_row(tmp_path: Any) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no backward\nnor forward")

    measured = runner().measure(
        suite(fastvar=square, cube=lambda x: x**3, pow=lambda x: x**2, absent="is not installed", broken=broken),
        SETTING,
        "training",
    )
    row = json.loads(json.dumps(measured.row))
    assert set(row["contenders"]) == {"fastvar", "pow"} == set(measured.seconds)
    assert set(row["ratios"]) == {"pow"} and row["rounds"] == 3 == len(measured.seconds["pow"])
    assert row["missing"] == {"absent": "is not installed", "broken": "NotImplementedError: no backward"}
    assert set(row["wrong"]) == {"cube"} and row["wrong"]["cube"] > row["limit"]
    ours = row["contenders"]["fastvar"]
    assert ours["error"] < 1e-6 and ours["peak_mib"] >= 0 and 0 < ours["roofline"] < 1
    assert {"device", "threads", "torch", "commit", "dirty", "command", "date", "load"} <= set(row)


def test_wrong_gradients_are_wrong() -> None:
    """A contender that is right in the forward pass only is not timed in a training pass."""

    def half_gradient(x: torch.Tensor) -> torch.Tensor:
        return x * x.detach()

    contestants = suite(fastvar=square, half=half_gradient)
    assert runner().measure(contestants, SETTING, "forward").row["wrong"] == {}
    assert set(runner().measure(contestants, SETTING, "training").row["wrong"]) == {"half"}
    assert set(runner().measure(contestants, SETTING, "backward").row["wrong"]) == {"half"}


@pytest.mark.slow
def test_backward_passes_of_compiled_code() -> None:
    """Compiled code gives its saved tensors away, so that no graph can be kept."""
    contestants = suite(fastvar=square, compiled=torch.compile(lambda x: (x.sin() * x).exp()[:0].sum() + x * x))
    row = runner().measure(contestants, SETTING, "backward").row
    assert set(row["contenders"]) == {"fastvar", "compiled"} and row["missing"] == {}


def test_ours_wrong_is_an_error() -> None:
    with pytest.raises(Wrong, match=r"squares, tiny, batch 3, float32, forward: fastvar: error .*expected at most"):
        runner().measure(suite(fastvar=lambda x: x + 1, pow=square), SETTING, "forward")
    with pytest.raises(Wrong, match="fastvar: TypeError"):
        runner().measure(suite(fastvar=lambda y: y), SETTING, "forward")


def test_contenders_are_as_declared() -> None:
    incomplete = Suite("squares", {}, ("fastvar", "pow"), lambda *_: Problem({}, {"fastvar": square}))
    with pytest.raises(ValueError, match=r"squares: build: expected contenders \('fastvar', 'pow'\), got"):
        runner().measure(incomplete, SETTING, "forward")


def test_relative_error() -> None:
    a = torch.tensor([1.0, 2.0])
    assert relative_error((a, [a]), (a, [a])) == 0
    assert relative_error(a, torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(a, a[:1]) == float("inf")
    assert relative_error(a * float("nan"), a) == float("inf")


def test_settings_are_unique() -> None:
    for one in SUITES:
        for size, settings in one.settings.items():
            names = [setting_name(setting) for setting in settings]
            assert len(set(names)) == len(names) > 0, (one.name, size)
        assert {"tiny", "cpu", "gpu"} == set(one.settings)
    assert len({one.name for one in SUITES}) == len(SUITES)
