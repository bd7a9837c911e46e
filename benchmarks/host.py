"""What calls of the operators in Triton cost the host: `python -m benchmarks.host`. It needs no GPU.

A stand-in takes the place of the CUDA driver, so that all of a call runs but the work on the device: checks, dispatch,
autograd, PyTorch's small operators (on a CPU), and launches up to the driver, which on a GPU takes some more
microseconds for each of them. Calls are those of the suites' smallest sizes, with kernels launched as the package does
and, beside that, as Triton does by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from fastvar.kernels.common.launching import Kernel
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import records
from benchmarks.cases import OURS
from benchmarks.report import HOST
from benchmarks.runner import call_of
from benchmarks.suites import cases
from fastvar.ops import _dispatch

Launched = list[tuple[Any, tuple[Any, ...]]]
ROUNDS = 10


class Driver:
    """Of a Hopper that is not there. Kernels are compiled for it; launches are noted and not carried out.

    Attributes:
        launches: of each the compiled kernel's function and all that was handed over.
    """

    def __init__(self) -> None:
        self.launches: Launched = []
        self.utils = self
        self._loaded = 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            self.launches.append((function, ((x, y, z), *rest[4:])))

        return launch

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        self._loaded += 1
        return self._loaded, self._loaded, 64, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 99  # Triton keeps compiled kernels by it: never those of a GPU that is there

    def get_current_stream(self, device: int) -> int:
        return 0


_DRIVER = Driver()  # a kernel stays with the driver that loaded it
# Operators of one or a few kernels, whose results nothing on the host looks at.
SUITES = (
    "block_causal_attention", "cached_attention", "qk_norm_rope", "qk_norm_rope_into_cache", "adaptive_layer_norm",
    "gated_residual", "gated_residual_norm", "sample_tokens", "sample_bits", "propagate_mask", "group_norm_silu",
)  # fmt: skip


@contextmanager
def without_device() -> Iterator[Driver]:
    """Inside, operators that are given tensors on a CPU launch their kernels in Triton, on a `Driver`."""
    here = {
        op: tuple(replace(row, devices=()) if row.backend == "triton" else row for row in rows)
        for op, rows in _dispatch.REGISTRY.items()
    }
    preference = dict.fromkeys(here, ("triton",))
    _dispatch.forget_answers()
    with (
        patch.dict(_dispatch.REGISTRY, here),
        patch.dict(_dispatch.PREFERENCE, preference),
        patch.object(driver, "_active", _DRIVER),
    ):
        try:
            yield _DRIVER
        finally:
            _dispatch.forget_answers()


def rows(names: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """What each suite's first setting takes: medians of calls."""
    for suite, setting, pass_ in cases("tiny", names, settings="first"):
        call = call_of(suite.build(setting, torch.device("cpu")), OURS, pass_)
        with without_device() as stand_in:
            call()
            stand_in.launches.clear()
            call()
            launches = len(stand_in.launches)
            ours, theirs = [], []
            for _ in range(ROUNDS):
                ours += _samples(call, seconds / ROUNDS / 2)
                with patch.object(Kernel, "launch", by_triton):
                    theirs += _samples(call, seconds / ROUNDS / 2)
        us = {"us": round(median(ours), 1), "by_triton_us": round(median(theirs), 1)}
        yield {"suite": suite.name, "pass": pass_, "launches": launches, **us}


def _samples(call: Callable[[], Any], seconds: float) -> list[float]:
    """Microseconds of each call, after one that is not counted."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - start))
    return taken


def by_triton(self: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """A launch as Triton makes it."""
    self.function[grid](*arguments, **constants)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default="", help="some of them; all that are known by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pass")
    parser.add_argument("--rows", type=Path, default=HOST, help="file to append to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = options.suites.split(",") if options.suites else SUITES
    for row in rows(names, options.seconds):
        print("{suite}, {pass}: {us} us, {by_triton_us} by Triton, {launches} launches".format(**row), flush=True)
        records.append(options.rows, {"benchmark": "host", **row, **records.provenance()})


if __name__ == "__main__":
    main()
