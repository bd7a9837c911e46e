"""The checks of edges.py, for the backends that run on a CPU; tests/interpreted runs them for Triton."""

from __future__ import annotations

from collections.abc import Callable

import edges
import pytest

from fastvar.ops._dispatch import REGISTRY


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("check", edges.CHECKS)
def test_edges(check: Callable[[str], None], backend: str) -> None:
    if check is edges.certain_bits_are_drawn and backend == "cpu":
        missing = next(i for i in REGISTRY["sample_bits"] if i.backend == backend).missing()
        if missing is not None:
            pytest.skip(missing)
    check(backend)
