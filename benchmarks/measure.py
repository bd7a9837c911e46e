"""Timing: contenders in turns, in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

Call = Callable[[], Any]
SHORTEST_SAMPLE = 2e-3  # seconds on a CPU; a shorter call is repeated within a sample
ROUNDS = (5, 50)  # least and most
_BROKEN: list[str] = []  # why a capture failed; then no other one is tried
LONG_ROUND = 5.0  # seconds; where a round takes longer, three are enough
LONG_CALL = 1.0  # seconds; such a call needs no second one to warm up


class Stopwatch:
    """Times a call, a sample at a time.

    Args:
        call: called at once, to warm up, a short one several times. One with a method `setup` has it called before
            each sample, outside of the time.
        device: on a GPU events are the clock and the L2 cache is flushed before each call; on a CPU `perf_counter` is,
            and a short call is repeated within a sample.

    Attributes:
        expected: seconds that a sample may take.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call, self._device, self._repeats = call, device, 1
        self.expected = self()
        if self.expected < LONG_CALL:
            self.expected = min(self.expected, self())
        if device.type != "cuda" and not hasattr(call, "setup"):
            for _ in range(2):  # of a very short call the first guess is far off
                self._repeats = max(1, round(SHORTEST_SAMPLE / max(self.expected, 1e-8)))
                self.expected = self() if self._repeats > 1 else self.expected
            self.expected *= self._repeats

    def __call__(self) -> float:
        """Seconds of one call, in a new sample."""
        set_up(self._call)
        if self._device.type != "cuda":
            start = time.perf_counter()
            for _ in range(self._repeats):
                self._call()
            return (time.perf_counter() - start) / self._repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _larger_than_l2(self._device).zero_()  # also hides the launch of the first kernel
        begin.record()
        self._call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def set_up(call: Call) -> None:
    """Whatever a call needs before it is timed."""
    setup = getattr(call, "setup", None)
    if setup is not None:
        setup()


@lru_cache
def _larger_than_l2(device: torch.device) -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device=device)


def interleave(
    calls: Mapping[str, Call], device: torch.device, budget: float, *, label: str = "", rounds: tuple[int, int] = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call in every round, and why those are missing that raised. In a round each is called once, in an
    order that rotates, so that a noisy neighbour or a falling clock meets all of them; ratios within a round are then
    meaningful.

    Args:
        calls: by name.
        device: see `Stopwatch`.
        budget: seconds to spend, if the least number of rounds allows.
        label: of the NVTX ranges around the calls.
        rounds: least and most.
    """
    failed: dict[str, str] = {}
    watches: dict[str, Stopwatch] = {}
    for name, call in calls.items():
        with _failures(name, failed):
            watches[name] = Stopwatch(call, device)
    a_round = sum(watch.expected for watch in watches.values())
    least = 3 if a_round > LONG_ROUND else rounds[0]
    count = min(max(int(budget / max(a_round, 1e-9)), least), max(least, rounds[1]))
    seconds: dict[str, list[float]] = {name: [] for name in watches}
    names = list(watches)
    with _without_garbage_collection():
        for number in range(count):
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if name not in failed:
                    with _failures(name, failed), nvtx_range(f"{label}{name}"):
                        seconds[name].append(watches[name]())
    return {name: values for name, values in seconds.items() if name not in failed}, failed


@contextmanager
def _failures(name: str, failed: dict[str, str]) -> Iterator[None]:
    """What one contender raises is noted and does not stop the others."""
    try:
        yield
    except Exception as error:
        failed[name] = reason(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def graphed(call: Call) -> Call:
    """A call's kernels as a CUDA graph, without the host's share.

    Raises:
        RuntimeError: it waits for the device or cannot be captured for another reason.
    """
    if _BROKEN:
        raise RuntimeError("an earlier capture failed in this process")
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a call that waits is known before a capture that it would break
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        # What a failed capture leaves behind: its stream, a generator and an allocator that believe it goes on.
        _BROKEN.append(reason(error))
        torch.cuda.set_stream(before)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise RuntimeError(f"no graph: {error}") from error
    return graph.replay


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A range that profilers show; nothing without the package nvtx."""
    try:
        import nvtx
    except ImportError:
        yield
        return
    with nvtx.annotate(name, domain="fastvar benchmarks"):
        yield
