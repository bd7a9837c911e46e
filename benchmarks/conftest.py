"""Options of `pytest benchmarks/ --benchmark-only`, and one test for each contender of each pass of each setting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.cases import PASSES, Suite, setting_name
from benchmarks.runner import Measured, Options, Runner
from benchmarks.suites import cases, device_of, size_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvar", "benchmarks of fastvar")
    group.addoption("--size", choices=["auto", "tiny", "cpu", "gpu"], default="auto", help="auto: gpu if there is one")
    group.addoption("--suites", default="", help="names of suites with commas between them; all by default")
    group.addoption("--passes", default="forward,training", help=f"some of {','.join(PASSES)}")
    group.addoption("--settings", choices=["first", "rest", "all"], default="all", help="first: of each suite")
    group.addoption("--rows", type=Path, default=Path("outputs/benchmarks.jsonl"), help="rows are added to this file")
    group.addoption("--seconds", type=float, default=3.0, help="of timing, for each pass of each setting")
    group.addoption("--time-budget", type=float, default=0.0, help="seconds for all; what is left then is skipped")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names, passes = ([word for word in option(name).split(",") if word] for name in ("--suites", "--passes"))
    try:
        chosen = list(cases(size_of(option("--size")), names, passes, option("--settings")))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    each = [
        pytest.param(suite, setting, pass_, name, id=_id(suite, setting, pass_, name))
        for suite, setting, pass_ in chosen
        for name in suite.contenders
    ]
    metafunc.parametrize(("suite", "setting", "pass_", "contender"), each)


def _id(suite: Suite, setting: Any, pass_: str, contender: str) -> str:
    return f"{suite.name}, {setting_name(setting)}, {pass_}: {contender}"


class Session:
    """Measures all contenders of a pass when the first of them is asked for, and writes the row at once."""

    def __init__(self, config: pytest.Config) -> None:
        device = device_of(size_of(config.getoption("--size")))
        self.runner = Runner(Options(device, budget=config.getoption("--seconds")))
        self.rows: Path = config.getoption("--rows")
        budget = config.getoption("--time-budget")
        self.deadline = time.monotonic() + budget if budget else float("inf")
        self._key = ""
        self._found: Measured | Exception | None = None

    def measured(self, suite: Suite, setting: Any, pass_: str) -> Measured | Exception | None:
        """What a pass gave, the exception that it raised, or None if there was no time left."""
        key = f"{suite.name}, {setting}, {pass_}"
        if self._key != key:
            self._key, self._found = key, None
            if time.monotonic() < self.deadline:
                try:
                    self._found = self.runner.measure(suite, setting, pass_)
                except Exception as error:
                    self._found = error
                else:
                    records.append(self.rows, self._found.row)
        return self._found


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return Session(pytestconfig)
