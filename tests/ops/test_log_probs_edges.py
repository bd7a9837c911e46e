"""The checks of edges.py, for the backends that run on a CPU; tests/interpreted runs them for Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import edges


@pytest.mark.parametrize(
    ("check", "backend"),
    [
        (c, b)
        for c in edges.CHECKS
        for b in ("torch", "reference")
        if b != "torch" or c is not edges.certain_bits_are_drawn
    ],
)
def test_edges(check: Callable[[str], None], backend: str) -> None:
    check(backend)
