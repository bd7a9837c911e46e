"""Peak memory of a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import set_up
from fastvar.models.graphs import Held, held


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """MiB that a call holds at its peak beyond what was held before it, by its `setup` for instance; what it returns is
    freed.

    On a GPU of torch's allocator, and what the CUDA graphs hold that a `generate` in the call has replayed: they have
    it before the call and after it. On a CPU of the process's resident memory (Linux), after freed memory was given
    back to the system, so that what an earlier call left behind is not taken for nothing.

    Raises:
        OSError: on a CPU, a system that does not let a process reset its peak.
    """
    set_up(call)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        graphs = Replayed()
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before + graphs.nbytes()) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


class Replayed:
    """The graphs of `generate` that answer calls from now on."""

    def __init__(self) -> None:
        self._before = held()

    def nbytes(self) -> int:
        """That graphs of the models hold whose graphs have answered a call since; 0 if none has."""
        nothing = Held(0, 0)
        return sum(now.nbytes for model, now in held().items() if now.calls > self._before.get(model, nothing).calls)


def _status(field: str) -> int:
    """A figure of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])
