"""No operator waits for the device: where there is no GPU, nothing that would wait is called on a CPU.

What an operator makes once for a schedule and a device may wait; so every call is made twice, and watched the second
time. Kernels in Triton are not run but recorded, for what matters is what the launching code asks of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from fastvar.kernels.adaptive_layer_norm import reference
from fastvar.kernels.token_log_probs import checks, impl_torch

from fastvar import ScaleSchedule
from fastvar.ops import _triton, adaptive_layer_norm, bitwise_residual_quantize
from fastvar.ops._dispatch import REGISTRY
from fastvar.ops._numbers import on_device
from tests.helpers.samples import SAMPLES
from tests.helpers.waiting import Waits

IMPLEMENTATIONS = [
    (name, row.backend)
    for name in SAMPLES
    for row in REGISTRY[name]
    if row.backend in ("reference", "torch", "triton", "sdpa")
    and (not row.devices or "cuda" in row.devices)
    and (name, row.backend) != ("sample_tokens", "reference")  # NumPy has a part in it on CPUs alone
]


def test_what_is_watched() -> None:
    """The hook sees the usual ways to wait, and nothing in what does not."""
    x = torch.ones(3)
    for call in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x[0] > 0),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: x.new_tensor([1.0]),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
    ):
        with Waits() as waits:
            call()
        assert waits.seen
    with Waits() as waits:
        torch.where(x > 0, x, 0).sum() + torch.zeros(3).new_zeros(3) + torch.full((3,), 2.0) + torch.arange(3)
    assert not waits.seen


@pytest.mark.parametrize("read", [float, bool, lambda t: t.item(), lambda t: t.tolist(), torch.nonzero])
def test_what_is_watched_inside_of_an_op(read: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    norm = reference.norm
    monkeypatch.setattr(reference, "norm", lambda call: (read(call.x.sum()), norm(call))[1])
    with Waits() as waits:
        adaptive_layer_norm(torch.ones(1, 2, 3), torch.ones(1, 3), torch.ones(1, 3), backend="reference")
    assert waits.seen


def test_no_new_number_waits() -> None:
    """Probabilities of flips are drawn anew for each batch."""
    features = torch.randn(1, 2, 3, 3)
    for probabilities in ([0.25, 0.5], [0.25, 0.5], [0.5, 0.5]):
        with Waits() as waits:
            bitwise_residual_quantize(
                features, ScaleSchedule((1, 3)), flip_probability=probabilities, seed=0, backend="reference"
            )
        assert not waits.seen
    for numbers in ([0.25, 0.1], []):
        assert torch.equal(on_device(numbers, torch.float32, features.device), torch.tensor(numbers))


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_no_operator_waits(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recording: Any = nullcontext
    for module, function in ((checks, "check_range"), (impl_torch, "_only_live")):  # they ask on CPUs alone
        monkeypatch.setattr(module, function, lambda *given: (given[0], None))
    if backend == "triton":
        if find_spec("triton") is None:
            pytest.skip("triton is not installed")
        from tests.helpers.ahead_of_time import recorded

        recording = recorded
        for op, implementations in REGISTRY.items():  # one function may call several operators
            here = tuple(replace(i, devices=()) if i.backend == "triton" else i for i in implementations)
            monkeypatch.setitem(REGISTRY, op, here)
        monkeypatch.setattr(_triton, "_INSTALLED", True)
        monkeypatch.setattr(torch, "empty", torch.zeros)  # nothing is written there, and indices have to exist

    for i, (function, arguments, names) in enumerate(SAMPLES[name](torch.float32)):
        leaves = [arguments[key].detach().requires_grad_() for key in names]
        arguments = {**arguments, **dict(zip(names, leaves, strict=True)), "backend": backend}

        def run(function: Any = function, arguments: Any = arguments, leaves: Any = leaves) -> None:
            results = function(**arguments)
            results = [results] if isinstance(results, torch.Tensor) else results
            outputs = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
            if outputs:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs], allow_unused=True)

        with recording():
            run()
            with Waits() as waits:
                run()
        assert not waits.seen, (i, waits.seen)
