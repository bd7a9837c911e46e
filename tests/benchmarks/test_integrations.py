"""The public code with our operators in it, where there is a checkout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import setting_name
from benchmarks.runner import Options, Runner
from benchmarks.suites.integrations import PATCHED, PLAIN, SUITE
from fastvar.integrations import patching

TINY = [{**setting, "size": "tiny"} for setting in SUITE.settings["tiny"]]


@pytest.mark.parametrize("setting", TINY, ids=setting_name)
def test_patched_public_code_is_right(setting: Any) -> None:
    """By the checks of the jobs, and patched when it is meant to be."""
    found = Runner(Options(torch.device("cpu"))).check(SUITE, setting, "forward")
    patched, plain = (found.problem.contenders[name] for name in (PATCHED, PLAIN))
    if isinstance(patched, str):
        assert patched == plain and found.errors.keys() == {"fastvar"}
        pytest.skip(patched)
    assert found.failed == {} and all(error <= found.limit for error in found.errors.values())
    for contender, expected in ((patched, True), (plain, False)):
        contender.setup()  # type: ignore[union-attr]
        model = contender.call.model  # type: ignore[union-attr]
        assert any(hasattr(module, patching._OWN) for module in model.modules()) == expected
