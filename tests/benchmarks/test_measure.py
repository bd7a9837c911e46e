"""Timing, memory and rooflines: what is measured is what was called."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.machine import Peaks, peaks, roofline
from benchmarks.measure import Stopwatch, interleave
from benchmarks.memory import peak_memory

CPU = torch.device("cpu")


def test_seconds_of_a_call() -> None:
    watch = Stopwatch(lambda: time.sleep(0.01), CPU)
    assert 0.01 <= watch() < 0.02
    calls = []
    short = Stopwatch(lambda: calls.append(0), CPU)
    calls.clear()
    seconds = short()
    assert len(calls) > 100 and seconds < 1e-5


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.003)

    calls = {name: (lambda name=name: call(name)) for name in "abc"}
    seconds, failed = interleave(calls, CPU, 0.0, rounds=(4, 9))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4} and failed == {}
    assert "".join(order[-12:]) == "abc" + "bca" + "cab" + "abc"
    assert len(interleave(calls, CPU, 10.0, rounds=(4, 9))[0]["a"]) == 9


def test_whoever_raises_is_named_and_stops_nobody() -> None:
    left = [3]

    def tired() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no more\nof it")
        time.sleep(0.003)

    def broken() -> None:
        raise ValueError

    calls = {"fine": lambda: time.sleep(0.003), "tired": tired, "broken": broken}
    seconds, failed = interleave(calls, CPU, 0.0, rounds=(4, 4))
    assert set(seconds) == {"fine"} and len(seconds["fine"]) == 4
    assert failed == {"tired": "MemoryError: no more", "broken": "ValueError: "}


def test_setup_is_not_timed() -> None:
    class Call:
        ready = 0

        def setup(self) -> None:
            time.sleep(0.02)
            self.ready += 1

        def __call__(self) -> None:
            self.ready -= 1

    call = Call()
    assert Stopwatch(call, CPU)() < 0.01 and call.ready == 0


def test_peak_memory_of_a_call() -> None:
    def hold(mib: int) -> None:
        kept = [torch.ones(mib * 2**18) for _ in range(2)]
        del kept

    hold(64)
    assert peak_memory(lambda: hold(64)) == pytest.approx(128, abs=12)
    assert peak_memory(lambda: hold(32)) == pytest.approx(64, abs=12)


def test_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peaks(CPU, torch.float32)
    assert 1e9 < found.flops < 1e14 and 1e8 < found.bandwidth < 1e13
    monkeypatch.setattr("benchmarks.machine.peaks", lambda *_: Peaks(100.0, 10.0))
    assert roofline(200, 10, CPU, torch.float32) == 2
    assert roofline(200, 50, CPU, torch.float32) == 5
    assert roofline(0, 0, CPU, torch.float32) == 0
