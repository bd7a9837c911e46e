"""Launches that are remembered are those that Triton would make by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastvar.kernels.common import launching
from fastvar.kernels.common.launching import Kernel, kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import host, records
from benchmarks.cases import OURS
from benchmarks.runner import call_of
from benchmarks.suites import cases


@kernel(do_not_specialize=["loose"])
def _kernel(x_ptr, y_ptr, count, loose, factor, flag, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, place < count).to(tl.float32) * factor + loose
    if y_ptr is not None:
        x += tl.load(y_ptr + place, place < count)
    if WIDE:
        x *= 2
    tl.store(x_ptr + place, tl.where(flag, x, 0.0), place < count)


def plain(launch: Callable[[], Any]) -> None:
    """As Triton launches."""
    with patch.object(Kernel, "launch", host.by_triton):
        launch()


X = torch.zeros(64)
CALLS: dict[str, tuple[Any, ...]] = {
    "first": (X, None, 16, 5, 0.5, True, {}),
    "another number of the kind": (X, None, 32, 7, 2.5, False, {}),
    "no multiple of 16": (X, None, 17, 5, 0.5, True, {}),
    "one": (X, None, 1, 1, 1.0, True, {}),
    "more than 32 bits": (X, None, 2**31, 5, 0.5, True, {}),
    "more than 32 bits, not specialised": (X, None, 16, 2**31, 0.5, True, {}),
    "not at 16 bytes": (X[1:], None, 16, 5, 0.5, True, {}),
    "another dtype": (X.bfloat16(), None, 16, 5, 0.5, True, {}),
    "a parameter": (torch.nn.Parameter(X), None, 16, 5, 0.5, True, {}),
    "two tensors": (X, X, 16, 5, 0.5, True, {}),
    "two tensors, one not at 16 bytes": (X, X[1:], 16, 5, 0.5, True, {}),
    "an integer for a float": (X, None, 16, 5, 2, True, {}),
    "another constant": (X, None, 16, 5, 0.5, True, {"BLOCK": 32}),
    "another option": (X, None, 16, 5, 0.5, True, {"num_warps": 2}),
}


def test_the_compiled_kernel_is_the_one_that_triton_finds() -> None:
    with host.without_device() as driver:

        def made(launch: Callable[[], Any]) -> Any:
            driver.launches.clear()
            launch()
            (found,) = driver.launches
            return found

        functions = set()
        for name, (*arguments, changes) in CALLS.items():
            constants = {"BLOCK": 64, "WIDE": False, **changes}

            def launch(arguments: Any = tuple(arguments), constants: Any = constants) -> None:
                _kernel[(3,)](*arguments, **constants)

            expected = made(lambda launch=launch: plain(launch))  # type: ignore[misc]
            assert made(launch) == made(launch) == expected, name
            functions.add(expected[0])
        assert len(functions) >= 10  # they do differ


def test_from_the_second_launch_on_triton_does_not_look() -> None:
    x = torch.zeros(64)
    with host.without_device() as driver:
        _kernel[(1,)](x, None, 48, 0, 0.5, True, BLOCK=64, WIDE=True)
        with patch.object(triton.runtime.jit.JITFunction, "run", side_effect=AssertionError):
            driver.launches.clear()
            _kernel[(2,)](torch.zeros(64), None, 48, 3, 1.5, False, BLOCK=64, WIDE=True)
        assert driver.launches[0][1][0] == (2, 1, 1)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST", 4)
    fresh = Kernel(_kernel.function)
    with host.without_device() as driver:
        for count in range(3, 43, 2):
            driver.launches.clear()
            fresh[(1,)](X, None, count, 5, 0.5, True, BLOCK=64, WIDE=False)
            assert driver.launches[0][1][3] == count
        (alike,) = fresh._alike.values()
        assert alike is not None and 0 < len(alike.known) <= 4


def test_arguments_of_other_kinds_are_left_to_triton() -> None:
    descriptor = TensorDescriptor.from_tensor(torch.zeros(16, 16), [16, 16])
    assert _kernel._like((descriptor, None, 1, 1, 1.0, True)) is None
    assert _kernel._like((X, None, 1, 1, 1.0, True)) is not None


@pytest.mark.parametrize("name", ["block_causal_attention", "sample_tokens", "gated_residual_norm"])
def test_operators_launch_what_triton_would(name: str) -> None:
    def told(argument: Any) -> Any:
        return (argument.shape, argument.dtype) if isinstance(argument, torch.Tensor) else argument

    for suite, setting, pass_ in cases("tiny", [name], settings="first"):
        call = call_of(suite.build(setting, torch.device("cpu")), OURS, pass_)
        with host.without_device() as driver:
            found = []
            for way in (lambda call=call: plain(call), call, call):
                driver.launches.clear()
                way()
                found.append([(function, [told(each) for each in given]) for function, given in driver.launches])
        assert found[0] == found[1] == found[2] and found[0]


def test_the_host_time_is_recorded(tmp_path: Path) -> None:
    host.main(["--suites", "gated_residual", "--seconds", "0.02", "--rows", str(tmp_path / "rows.jsonl")])
    forward, training = records.read(tmp_path / "rows.jsonl")
    assert (forward["launches"], training["launches"]) == (1, 3)
    assert all(row[name] > 0 for row in (forward, training) for name in ("us", "by_triton_us"))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Launches that are remembered do what Triton's own do: on another stream, in a graph, where memory is not at 16
    bytes."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.arange(64.0, device="cuda")

    def run(launched: torch.Tensor) -> torch.Tensor:
        _kernel[(1,)](launched, x, launched.numel(), 5, 0.5, True, BLOCK=64, WIDE=True)
        return launched

    expected = x.clone()
    plain(lambda: run(expected))
    torch.testing.assert_close(expected, 2 * (x * 0.5 + 5 + x))
    for _ in range(2):
        assert torch.equal(run(x.clone()), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run(x.clone())
    stream.synchronize()
    assert torch.equal(other, expected)
    held = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(held)
    held.copy_(x)
    graph.replay()
    assert torch.equal(held, expected)
    for _ in range(2):
        longer = torch.cat([x.new_zeros(1), x])
        assert torch.equal(run(longer[1:]), expected)
