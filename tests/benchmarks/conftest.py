"""Rows for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

import pytest


def made_row(
    suite: str, pass_: str = "forward", *, ours: float = 2e-3, rival: float = 3e-3, **changes: Any
) -> dict[str, Any]:
    """A row as the runner writes it."""

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": 0.9 * value, "high": 1.1 * value}

    return {
        "benchmark": "suite",
        "suite": suite,
        "setting": {"model": "VAR-d16", "batch": 2, "dtype": "float32", "size": "cpu"},
        "pass": pass_,
        "backend": "reference",
        "contenders": {
            "fastvar": {"seconds": spread(ours), "error": 0.0, "peak_mib": 10.0, "roofline": 0.5},
            "eager": {"seconds": spread(rival), "error": 0.0, "peak_mib": 25.0, "roofline": 0.3},
        },
        "ratios": {"eager": spread(rival / ours)},
        "missing": {"flash-attn": "flash_attn is not installed"},
        "wrong": {"sloppy": 0.5},
        "limit": 1e-5,
        "rounds": 5,
        "versions": {},
        "peaks": {"flops": 1e11, "bandwidth": 1e10},
        "device": "a CPU",
        "cores": 2,
        "threads": 2,
        "load": 0.1,
        "torch": "2.14.1",
        "triton": "3.8.0",
        "cuda": None,
        "driver": None,
        "python": "3.11.7",
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "pytest benchmarks",
        "date": "2026-11-21T12:00:00+00:00",
        **changes,
    }


@pytest.fixture
def row() -> Any:
    return made_row
