"""Options of `pytest benchmarks/ --benchmark-only`, and one test for each contender of each pass of each setting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import records
from benchmarks.cases import PASSES, Suite, setting_name
from benchmarks.measure import reason
from benchmarks.order import Journal, by_priority, part_of, share
from benchmarks.runner import Measured, Options, Runner
from benchmarks.suites import cases, device_of, size_of

BROKEN_DEVICE = 70  # exit status: every later call would fail; start again with --resume


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvar", "benchmarks of fastvar")
    group.addoption("--size", choices=["auto", "tiny", "cpu", "gpu"], default="auto", help="auto: gpu if there is one")
    group.addoption("--suites", default="", help="names of suites with commas between them; all by default")
    group.addoption("--passes", default="forward,training", help=f"some of {','.join(PASSES)}")
    group.addoption("--settings", choices=["first", "rest", "all"], default="all", help="first: of each suite")
    group.addoption("--rows", type=Path, default=Path("outputs/benchmarks.jsonl"), help="rows are added to this file")
    group.addoption("--seconds", type=float, default=3.0, help="of timing, for each pass of each setting")
    group.addoption("--time-budget", type=float, default=0.0, help="seconds for all; what is left then is skipped")
    group.addoption("--case-limit", type=int, default=0, help="seconds; a pass that takes longer ends the process")
    group.addoption("--by-priority", action="store_true", help="the most important passes first")
    group.addoption("--resume", action="store_true", help="leave out what --rows has from this device and this code")
    group.addoption("--warm", default="", help="I/N: only compile, the I-th of N parts, in an N-th of the GPU's memory")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names, passes = ([word for word in option(name).split(",") if word] for name in ("--suites", "--passes"))
    size = size_of(option("--size"))
    try:
        chosen = list(cases(size, names, passes, option("--settings")))
        warm = part_of(option("--warm"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if option("--by-priority"):
        chosen = by_priority(chosen)
    if warm:
        chosen = share(chosen, *warm)
    if option("--resume"):
        capture = metafunc.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():  # what it says is to be seen
            chosen = Journal(option("--rows"), records.device_name(device_of(size)), bool(warm)).open(chosen)
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
        option = config.getoption
        self.config, self.device = config, device_of(size_of(option("--size")))
        rounds = (2, 50) if size_of(option("--size")) == "tiny" else (5, 50)  # what is tiny is no result
        self.runner = Runner(Options(self.device, budget=option("--seconds"), rounds=rounds))
        self.rows: Path = option("--rows")
        self.warm = part_of(option("--warm"))
        self.journal = Journal(self.rows, records.device_name(self.device), bool(self.warm))
        if self.warm and self.device.type == "cuda":  # so that the others have their share
            torch.cuda.set_per_process_memory_fraction(0.9 / self.warm[1])
        budget = option("--time-budget")
        self.deadline = time.monotonic() + budget if budget else float("inf")
        self._key = ""
        self._found: Measured | Exception | None = None

    def measured(self, suite: Suite, setting: Any, pass_: str) -> Measured | Exception | None:
        """What a pass gave, the exception that it raised, or None if there was no time left or nothing to measure."""
        key = f"{suite.name}, {setting}, {pass_}"
        if self._key != key:
            self._key, self._found = key, None
            if time.monotonic() < self.deadline:
                self.journal.start(suite.name, setting, pass_)
                with self._limited():
                    try:
                        if self.warm:
                            self.runner.warm(suite, setting, pass_)
                        else:
                            self._found = self.runner.measure(suite, setting, pass_)
                    except Exception as error:
                        self._found = error
                if isinstance(self._found, Measured):
                    records.append(self.rows, self._found.row)
                elif self._found is not None:
                    self.journal.fail(suite.name, setting, pass_, reason(self._found))
                self._leave_if_broken()
        return self._found

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """An alarm that nobody handles ends the process, wherever it hangs."""
        signal.alarm(self.config.getoption("--case-limit"))
        try:
            yield
        finally:
            signal.alarm(0)

    def _leave_if_broken(self) -> None:
        if self.device.type == "cuda" and (self.warm or isinstance(self._found, Exception)):
            try:
                torch.cuda.synchronize()
            except Exception as error:
                capture = self.config.pluginmanager.getplugin("capturemanager")
                if capture is not None:
                    capture.suspend_global_capture(in_=True)
                print(f"\n{self._key}: {self._found}\nthe device is broken: {error}", flush=True)
                os._exit(BROKEN_DEVICE)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return Session(pytestconfig)
