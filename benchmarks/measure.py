"""Timing: contenders in turns, in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Call = Callable[[], Any]
SHORTEST_SAMPLE = 2e-3  # seconds on a CPU; a shorter call is repeated within a sample
ROUNDS = (5, 50)  # least and most


def interleave(
    calls: Mapping[str, Call], device: torch.device, budget: float, *, label: str = "", rounds: tuple[int, int] = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each call in every round. In a round each is called once, in an order that rotates, so that a noisy
    neighbour or a falling clock meets all of them; ratios within a round are then meaningful.

    Args:
        calls: by name, at least one. They are called once before, to warm up.
        device: on a GPU events are the clock and the L2 cache is flushed before each call, on a CPU `perf_counter`.
        budget: seconds to spend, if the least number of rounds allows.
        label: of the NVTX ranges around the calls.
        rounds: least and most.
    """
    clock = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    once = {name: clock(call, 1) for name, call in calls.items()}
    once = {name: min(first, clock(calls[name], 1)) for name, first in once.items()}
    repeats = dict.fromkeys(calls, 1)
    if device.type != "cuda":
        repeats = {name: max(1, round(SHORTEST_SAMPLE / max(first, 1e-7))) for name, first in once.items()}
    a_round = sum(repeats[name] * first for name, first in once.items())
    count = min(max(int(budget / max(a_round, 1e-9)), rounds[0]), rounds[1])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _without_garbage_collection():
        for number in range(count):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                with nvtx_range(f"{label}{name}"):
                    seconds[name].append(clock(calls[name], repeats[name]))
    return seconds


def graphed(call: Call) -> Call:
    """A call's kernels as a CUDA graph, without the host's share.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _cpu_clock(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _gpu_clock(device: torch.device) -> Callable[[Call, int], float]:
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # several times the L2 of any GPU

    def clock(call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()  # also hides the launch of the first kernel
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return clock


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
