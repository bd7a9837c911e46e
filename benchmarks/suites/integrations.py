"""The public code with fastvar's operators in it (`fastvar.integrations.apply`) against the same code without.

The jobs are those of `generate` and `training_step`, with their checks: of FoundationVision/VAR and Infinity with
random weights, patched and not, and of our own model of the same weights. Patching is no part of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import OURS, Problem, Setting, Suite
from benchmarks.suites import generate, training_step
from fastvar.integrations import Applied, apply

PATCHED, PLAIN = "fastvar in upstream", "upstream"
JOBS = {"generate": generate.SUITE, "training_step": training_step.SUITE}


class Switched:
    """A contender: a call of a model that is patched before it, or not.

    Args:
        call: of the public code; has the `model`.
        applied: what is patched now, shared by those who share the model.
        patched: whether it is to be.
    """

    def __init__(self, call: Callable[..., Any], applied: list[Applied], patched: bool) -> None:
        self.call, self.applied, self.patched = call, applied, patched

    def setup(self) -> None:
        if self.patched and not self.applied:
            self.applied.append(apply(self.call.model))  # type: ignore[attr-defined]
        elif self.applied and not self.patched:
            self.applied.pop().undo()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.setup()
        return self.call(*inputs, **named)


def build(setting: Setting, device: torch.device) -> Problem:
    problem = JOBS[setting["job"]].build({k: v for k, v in setting.items() if k != "job"}, device)
    names = ("upstream", generate.FLOAT32 if setting["dtype"] == "float32" else "upstream bfloat16 autocast")
    (theirs,) = (problem.contenders[name] for name in names if name in problem.contenders)
    own, applied = problem.contenders[OURS], []
    problem.contenders = {OURS: own, PATCHED: theirs, PLAIN: theirs}
    if not isinstance(theirs, str):
        for name in (PATCHED, PLAIN):
            problem.contenders[name] = Switched(theirs, applied, name == PATCHED)
    return problem


def _both(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"job": job, **setting} for setting in settings for job in JOBS]


SUITE = Suite(
    "integrations",
    {
        "tiny": _both(
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "float32"},
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "bfloat16"},
            {"model": "Infinity-tiny", "batch": 1, "dtype": "float32"},
        ),
        "cpu": [
            {"job": "generate", "model": "VAR-d16", "batch": 1, "dtype": "float32"},
            {"job": "training_step", "grids": "var-256", "depth": 4, "width": 256, "batch": 2, "dtype": "float32"},
            {"job": "generate", "model": "Infinity-2B-0.06M", "depth": 4, "batch": 1, "dtype": "float32"},
            {"job": "training_step", "model": "Infinity-2B-0.06M", "depth": 2, "batch": 1, "dtype": "float32"},
        ],
        "gpu": [
            {"job": "generate", "model": "VAR-d16", "batch": 8, "dtype": "bfloat16"},
            {"job": "training_step", "model": "VAR-d16", "batch": 32, "dtype": "bfloat16"},
            {"job": "generate", "model": "Infinity-2B-0.06M", "batch": 8, "dtype": "bfloat16"},
            {"job": "training_step", "model": "Infinity-2B-0.06M", "batch": 8, "dtype": "bfloat16"},
        ],
    },
    (OURS, PATCHED, PLAIN),
    build,
    graphs=False,
)
