"""What every operator promises, checked for every registered operator through its public function."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar.ops import adaptive_layer_norm, explain, support
from fastvar.ops._dispatch import REGISTRY
from tests.helpers.samples import SAMPLES

# Every operator, with every implementation that runs on a CPU. Whether the extension is built where it can be built is
# the affair of tests/test_build.py.
IMPLEMENTATIONS = [
    (name, implementation.backend)
    for name in SAMPLES
    for implementation in REGISTRY[name]
    if (not implementation.devices or "cpu" in implementation.devices) and implementation.missing() is None
]


def widest(name: str, backend: str) -> torch.dtype:
    """float64, or float32 for an implementation that does not take that."""
    implementation = next(each for each in REGISTRY[name] if each.backend == backend)
    obstacle = implementation.why_not(torch.zeros(1, dtype=torch.float64))
    return torch.float64 if obstacle is None else torch.float32


def calls(
    name: str, backend: str, dtype: torch.dtype | None = None
) -> Iterator[tuple[Any, dict[str, Any], tuple[str, ...]]]:
    """The samples, by default in the widest dtype that the implementation takes. Says which one a test is at."""
    for i, (function, arguments, differentiable) in enumerate(SAMPLES[name](dtype or widest(name, backend))):
        print(f"sample {i}")
        yield partial(function, backend=backend), dict(arguments), differentiable


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result: a tensor, or a (named) tuple that may hold None."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [r for r in result if isinstance(r, torch.Tensor)]


def floating(result: Any) -> list[torch.Tensor]:
    return [r for r in tensors(result) if r.is_floating_point() and r.requires_grad]


class OpCalls(TorchDispatchMode):
    """Records the ops of the library fastvar that run inside it, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvar":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(REGISTRY)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_shapes_and_finite(name: str, backend: str) -> None:
    for function, arguments, _ in calls(name, backend):
        for result in tensors(function(**arguments)):
            assert result.is_contiguous()
            if result.is_floating_point():
                assert torch.isfinite(result).all()


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_reruns_are_bit_equal(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fresh memory is full of NaN (or the largest integer), as nothing reads it. Inputs are left alone."""
    for function, arguments, names in calls(name, backend, torch.float32):
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        leaves = {n: arguments[n].requires_grad_() for n in names}

        def run(function: Any = function, arguments: Any = arguments, leaves: Any = leaves) -> list[torch.Tensor]:
            results = function(**arguments)
            outputs = floating(results)
            if not outputs:
                return tensors(results)
            ones = [torch.ones_like(r) for r in outputs]
            return [*tensors(results), *torch.autograd.grad(outputs, list(leaves.values()), ones)]

        first, second = run(), run()
        assert all(torch.equal(arguments[k], v) for k, v in before.items())
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                third = run()
            finally:
                torch.use_deterministic_algorithms(False)
        for one, *others in zip(first, second, third, strict=True):
            assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize(("name", "backend"), [i for i in IMPLEMENTATIONS if widest(*i) == torch.float64])
def test_gradcheck(name: str, backend: str) -> None:
    for function, arguments, names in calls(name, backend):
        if names:
            leaves = tuple(arguments[n].clone().requires_grad_() for n in names)

            def run(
                *values: torch.Tensor, function: Any = function, arguments: Any = arguments, names: Any = names
            ) -> Any:
                return tuple(floating(function(**{**arguments, **dict(zip(names, values, strict=True))})))

            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_gradient_layouts_and_subsets(name: str, backend: str) -> None:
    """Expanded, sliced and transposed incoming gradients, and only the gradients asked for."""
    for function, arguments, names in calls(name, backend):
        check_gradients(function, arguments, names, 1e-12 if widest(name, backend) == torch.float64 else 1e-5)


def check_gradients(function: Any, arguments: dict[str, Any], names: tuple[str, ...], tolerance: float) -> None:
    def gradients(wanted: tuple[str, ...], relayout: Any) -> list[torch.Tensor | None]:
        leaves = {n: arguments[n].clone().requires_grad_(n in wanted) for n in names}
        results = floating(function(**{**arguments, **leaves}))
        torch.autograd.backward(results, [relayout(r) for r in results])
        return [leaves[n].grad for n in names]

    def dense(r: torch.Tensor) -> torch.Tensor:
        return torch.full_like(r, 0.5)

    layouts = {
        "stride 0": lambda r: torch.tensor(0.5, dtype=r.dtype).expand(r.shape),
        "slice": lambda r: torch.cat([torch.full_like(r, 0.5)] * 2, -1)[..., : r.shape[-1]] if r.ndim else dense(r),
        "transposed": lambda r: torch.full_like(r, 0.5).mT.contiguous().mT if r.ndim >= 2 else dense(r),
    }
    if not names:
        return
    close = {"rtol": tolerance, "atol": tolerance}
    expected = gradients(names, dense)
    for layout in layouts.values():
        for got, want in zip(gradients(names, layout), expected, strict=True):
            torch.testing.assert_close(got, want, **close)
    for wanted, want in zip(names, expected, strict=True):
        found = dict(zip(names, gradients((wanted,), dense), strict=True))
        torch.testing.assert_close(found.pop(wanted), want, **close)
        assert all(g is None for g in found.values())


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_opcheck(name: str, backend: str) -> None:
    """Schema, fake results and registration of the op and its backward, as called by the public function."""
    for function, arguments, names in calls(name, backend, torch.float32):
        leaves = {n: arguments[n].clone().requires_grad_() for n in names}
        with OpCalls() as recorded:
            results = floating(function(**{**arguments, **leaves}))
            if results:
                torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        # losses make their gradient in the forward pass
        expected = 2 if results and name not in ("policy_loss", "cross_entropy") else 1
        assert len(recorded.calls) >= expected, "the public function never reached its op"
        for op, args in recorded.calls:
            # opcheck itself cannot describe a sliced tensor without elements
            plain = [a.detach() if isinstance(a, torch.Tensor) and a.numel() else a for a in args]
            plain = [
                torch.zeros(a.shape, dtype=a.dtype) if isinstance(a, torch.Tensor) and not a.numel() else a
                for a in plain
            ]
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(op, tuple(plain), test_utils=tests)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    function, arguments, names = next(calls(name, backend, torch.float32))
    leaves = {n: arguments[n].clone().requires_grad_() for n in names}
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(**{**arguments, **leaves}), function(**{**arguments, **leaves})
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)
    if floating(got):
        sum(r.sum() for r in floating(got)).backward()
        assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize("name", list(SAMPLES))
def test_arrays_of_numpy_are_refused(name: str) -> None:
    """Their shapes and dtypes look like those of tensors, so that a message about these would not say what is wrong."""
    function, arguments, _ = next(iter(SAMPLES[name](torch.float32)))
    others = {"flip_probability"}  # any sequence of numbers is right
    if name == "qk_norm_rope_into_cache":
        others.add("q")  # the sample itself reads it
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor) and argument not in others:
            with pytest.raises(ValueError, match=f"^{name}: .*got ndarray"):
                function(**{**arguments, argument: value.numpy()})


@pytest.mark.parametrize("name", list(SAMPLES))
def test_requests_for_backends(name: str) -> None:
    function, arguments, _ = next(iter(SAMPLES[name](torch.float32)))
    function(**arguments, backend="reference")
    with pytest.raises(RuntimeError, match=f"{name}: backend='cuda' (does not exist|cannot run: runs on cuda)"):
        function(**arguments, backend="cuda")
    with pytest.raises(ValueError, match=f"{name}: backend: expected one of"):
        function(**arguments, backend="fastest")
    lead = next(v for v in arguments.values() if isinstance(v, torch.Tensor))
    assert explain(name, lead).backend in ("cpu", "torch", "reference")
    assert name in support().markdown()


def test_eager_calls_skip_the_library_unless_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That way costs more than a small kernel; modes and profilers still see the ops."""
    operator = import_module("fastvar.ops.adaptive_layer_norm")._NORM
    x, scale = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(adaptive_layer_norm(x, scale, scale).sum(), x)

    with OpCalls() as seen:
        expected = run()
    names = ["adaptive_layer_norm", "adaptive_layer_norm_backward"]
    assert [op.name().removeprefix("fastvar::") for op, _ in seen.calls] == names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert {f"fastvar::{name}" for name in names} <= {event.key for event in profile.key_averages()}

    def fail(*_: object) -> None:
        raise AssertionError("through torch.library")

    monkeypatch.setattr(operator, "op", fail)
    monkeypatch.setattr(operator, "backward_op", fail)
    assert torch.equal(run()[0], expected[0])
    with OpCalls(), pytest.raises(AssertionError, match=r"torch\.library"):
        run()
