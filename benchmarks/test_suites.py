"""Every operator and job against its rivals: `pytest benchmarks/ --benchmark-only`.

All contenders of a pass are timed together, in turns (`benchmarks.runner`); each test reports one of them to
pytest-benchmark, and all go to one row of the file `--rows`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import setting_name


def test_suite(suite: Any, setting: Any, pass_: str, contender: str, session: Any, benchmark: Any) -> None:
    measured = session.measured(suite, setting, pass_)
    if measured is None:
        pytest.skip("only compiled" if session.warm else "the time budget is spent")
    if isinstance(measured, Exception):
        raise measured
    row = measured.row
    if contender in row["missing"]:
        pytest.skip(row["missing"][contender])
    if contender in row["wrong"]:
        pytest.skip(f"wrong: error {row['wrong'][contender]:.2g}, limit {row['limit']:.2g}")
    benchmark.group = f"{suite.name}, {setting_name(setting)}, {pass_}"
    if not benchmark.enabled:  # --benchmark-disable: it has run, which is all
        return
    benchmark._mode = "interleaved"
    stats = benchmark._make_stats(1)
    for seconds in measured.seconds[contender]:
        stats.update(seconds)
    benchmark.extra_info |= row["contenders"][contender]
