"""Interrupts finish the step and save; the second one ends at once; all processes stop at the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.training.interrupts import Interrupts, SharedRequests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_does_what_it_did(
    number: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(got: int, frame: Any) -> None:
        seen.append(got)

    seen: list[int] = []
    old = {n: signal.signal(n, before) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Interrupts() as interrupts:
            assert interrupts.received is None
            os.kill(os.getpid(), number)
            assert interrupts.received == signal.Signals(number).name and seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
        with Interrupts():
            pass
        os.kill(os.getpid(), number)
        assert seen == [number] * 2
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)
    assert f"{signal.Signals(number).name}: saving after this step" in capfd.readouterr().err


def test_what_is_ignored_stays_so() -> None:
    """As under nohup."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received is None
    finally:
        signal.signal(signal.SIGINT, old)


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_forked_processes(capfd: pytest.CaptureFixture[str]) -> None:
    """They are told with the group: they go on in silence at first, and the second signal still ends them."""
    heard, tell = os.pipe()
    with Interrupts() as interrupts:
        child = os.fork()
        if not child:
            os.close(heard)
            os.write(tell, b"r")
            for _ in range(3000):
                if interrupts.received:
                    os.write(tell, b".")
                time.sleep(0.01)
            os._exit(0)
        os.close(tell)
        for expected in (b"r", b"."):
            assert os.read(heard, 1) == expected
            os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    os.close(heard)
    assert capfd.readouterr().err == ""


class Processes:
    """An accelerator of two processes; what the other one adds is given."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, others: list[tuple[float, float]]) -> None:
        self.others = iter(others)

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return values + torch.tensor(next(self.others))


def test_requests_of_several_processes_are_known_a_step_later() -> None:
    """By then the sum has arrived: each process does the same at the same step."""
    requests = SharedRequests(Processes([(0, 0), (1, 0), (0, 0), (0, 1), (0, 0)]))
    own = [(False, True), (False, False), (False, False), (False, False), (False, False)]
    assert [requests(*wish) for wish in own] == [
        (False, False),
        (False, True),
        (True, False),
        (False, False),
        (False, True),
    ]


def test_requests_of_one_process_are_known_at_once() -> None:
    requests = SharedRequests(SimpleNamespace(num_processes=1))
    assert requests(True, False) == (True, False) and requests(False, True) == (False, True)
