"""Operators over rows on a CPU: gradients, layouts, threads, batches.

The accuracy of their results is the affair of test_adaptive_layer_norm.py and test_qk_norm_rope.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastvar.ops import (
    adaptive_layer_norm,
    gated_residual,
    qk_norm_rope,
    qk_norm_rope_into_cache,
)
from fastvar.ops._dispatch import REGISTRY
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = dict[str, torch.Tensor]
Call = Callable[..., Any]


def norm_inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    x = (noise(batch, length, width, dtype=torch.float64) * 3 + 5).to(dtype)
    return {
        "x": x,
        "scale": noise(batch, width, dtype=dtype, seed=1),
        "shift": noise(batch, width, dtype=dtype, seed=2),
    }


def gate_inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    x, y = (noise(batch, length, width, dtype=dtype, seed=seed) for seed in (0, 1))
    return {"x": x, "y": y, "gate": noise(batch, width, dtype=dtype, seed=2)}


def head_inputs(
    batch: int, length: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, norm: bool = True
) -> Inputs:
    """Slices of one projection, and the scale, of whose heads the second is above log 100."""
    q, k, _ = noise(batch, length, 3, heads, dim, dtype=dtype).unbind(2)
    log_scale = torch.tensor([1.0, 7.0, -1.0] * heads, dtype=dtype)[:heads]
    return {"q": q, "k": k} | ({"log_scale": log_scale} if norm else {})


def turned(length: int, dim: int) -> dict[str, Any]:
    angle = noise(length, dim // 2, seed=3) * 3
    return {"rope": (angle.cos(), angle.sin())}


def with_gradients(call: Call, inputs: Inputs, relayout: Call | None = None, **rest: Any) -> list[torch.Tensor]:
    """Results and gradients, for incoming ones that differ everywhere."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    results = call(**leaves, **rest)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    grads = [noise(*r.shape, dtype=torch.float64, seed=9 + i).to(r.dtype) for i, r in enumerate(results)]
    torch.autograd.backward(results, [relayout(grad) for grad in grads] if relayout else grads)
    return [r.detach() for r in results] + [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


# Widths that are no multiples of any vector, one and several parts of the rows.
CASES: dict[str, tuple[Call, Call, dict[str, Any]]] = {}
for shape in [(2, 70, 65), (3, 1, 7), (1, 4, 1), (2, 33, 200)]:
    CASES[f"norm {shape}"] = adaptive_layer_norm, lambda dtype, shape=shape: norm_inputs(*shape, dtype), {}
    CASES[f"gate {shape}"] = gated_residual, lambda dtype, shape=shape: gate_inputs(*shape, dtype), {}
for dim in (2, 6, 16, 64, 72, 128):
    CASES[f"rope {dim}"] = qk_norm_rope, lambda dtype, dim=dim: head_inputs(2, 35, 3, dim, dtype), turned(35, dim)
CASES["no rope 15"] = qk_norm_rope, lambda dtype: head_inputs(2, 35, 3, 15, dtype), {}
CASES["no norm 20"] = qk_norm_rope, lambda dtype: head_inputs(2, 5, 3, 20, dtype, norm=False), turned(5, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_gradients(case: str, dtype: torch.dtype) -> None:
    call, make, rest = CASES[case]
    inputs = make(dtype)
    exact = with_gradients(call, {name: t.double() for name, t in inputs.items()}, backend="reference", **rest)
    plain = with_gradients(call, inputs, backend="reference", **rest)
    for got, by_reference, expected in zip(
        with_gradients(call, inputs, backend="torch", **rest), plain, exact, strict=True
    ):
        assert_as_accurate(got, by_reference, expected)


def layouts(inputs: Inputs) -> Iterator[Inputs]:
    """The same values: contiguous, with another order of dimensions, with gaps, and unaligned."""
    yield {name: t.contiguous() for name, t in inputs.items()}
    yield {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in inputs.items()}
    yield {name: t.transpose(1, -2).contiguous().transpose(1, -2) for name, t in inputs.items() if t.ndim > 2} | {
        name: t for name, t in inputs.items() if t.ndim <= 2
    }
    yield {name: torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
    yield {name: torch.cat([t, t], -1)[..., : t.shape[-1]] for name, t in inputs.items()}
    yield {name: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["norm (2, 70, 65)", "gate (2, 70, 65)", "rope 72", "no norm 20"])
def test_layouts(case: str, dtype: torch.dtype) -> None:
    """Of inputs and of incoming gradients: the same bits, save where the numbers of a head lie apart, whose squares are
    added in another order."""
    call, make, rest = CASES[case]
    relayouts: list[Call] = [
        lambda grad: grad.mT.contiguous().mT,
        lambda grad: torch.cat([grad, grad], -1)[..., : grad.shape[-1]],
    ]
    first, *others = layouts(make(dtype))
    expected = with_gradients(call, first, backend="torch", **rest)
    found = [with_gradients(call, inputs, backend="torch", **rest) for inputs in others]
    found += [with_gradients(call, first, relayout, backend="torch", **rest) for relayout in relayouts]
    tolerance = {} if call is qk_norm_rope else {"rtol": 0, "atol": 0}
    for each in found:
        for got, want in zip(each, expected, strict=True):
            torch.testing.assert_close(got, want, **tolerance)
    expanded = [
        with_gradients(call, first, lambda grad, to=to: to(torch.ones((), dtype=grad.dtype).expand(grad.shape)), **rest)
        for to in (torch.Tensor.contiguous, lambda grad: grad)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*expanded, strict=True))


@pytest.mark.parametrize("case", ["norm (2, 70, 65)", "gate (2, 70, 65)", "rope 64", "no norm 20"])
def test_only_the_gradients_asked_for(case: str) -> None:
    call, make, rest = CASES[case]
    inputs = make(torch.float32)
    weights = noise(*next(iter(inputs.values())).shape, seed=5)

    def gradients(wanted: list[str], used: int) -> dict[str, torch.Tensor | None]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        results = call(**leaves, **rest)
        results = [results] if isinstance(results, torch.Tensor) else results
        sum((r * weights).sum() for r in list(results)[:used]).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    everything = gradients(list(inputs), 2)
    for name in inputs:
        found = gradients([name], 2)
        assert torch.equal(found.pop(name), everything[name])
        assert all(grad is None for grad in found.values())
    if "q" in inputs:  # of queries alone: nothing reaches the keys
        found = gradients(list(inputs), 1)
        assert not found.pop("k").any()
        assert all(torch.equal(grad, everything[name]) for name, grad in found.items())


LARGE: list[tuple[Call, Inputs, dict[str, Any]]] = [
    (adaptive_layer_norm, norm_inputs(3, 90, 520), {}),
    (gated_residual, gate_inputs(3, 90, 520), {}),
    (qk_norm_rope, head_inputs(3, 90, 8, 64), turned(90, 64)),
]


@pytest.mark.parametrize(("call", "inputs", "rest"), LARGE)
def test_threads_leave_the_bits(call: Call, inputs: Inputs, rest: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(with_gradients(call, inputs, backend="torch", **rest))
    finally:
        torch.set_num_threads(threads)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


@pytest.mark.parametrize(("call", "inputs", "rest"), LARGE)
def test_the_batch_leaves_the_bits(call: Call, inputs: Inputs, rest: dict[str, Any]) -> None:
    """Of results and gradients of a sample; the gradient of the scale of heads is a sum over samples."""
    shared = {name: t for name, t in inputs.items() if name == "log_scale"}
    own = {name: t for name, t in inputs.items() if name != "log_scale"}
    weights = noise(*next(iter(own.values())).shape, seed=5)

    def run(samples: slice) -> list[torch.Tensor]:
        leaves = {name: t[samples].detach().requires_grad_() for name, t in own.items()}
        results = call(**leaves, **shared, **rest)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        torch.autograd.backward(results, [weights[samples]] * len(results))
        return [r.detach() for r in results] + [leaf.grad for leaf in leaves.values()]

    for a, b in zip(run(slice(1, 2)), run(slice(None)), strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.parametrize("case", ["norm (2, 70, 65)", "gate (3, 1, 7)", "rope 16", "no rope 15", "no norm 20"])
def test_reads_no_uninitialised_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the backward pass, also where an incoming gradient is missing."""
    call, make, rest = CASES[case]

    def run() -> list[torch.Tensor]:
        found = with_gradients(call, make(torch.float32), backend="torch", **rest)
        inputs = {name: t.detach().requires_grad_() for name, t in make(torch.float32).items()}
        results = call(**inputs, backend="torch", **rest)
        last = results if isinstance(results, torch.Tensor) else results[1]
        gradients = torch.autograd.grad(last.sum(), list(inputs.values()), allow_unused=True)
        return found + [gradient for gradient in gradients if gradient is not None]

    expected = run()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (2, 5, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    """No samples, tokens or channels: modulations get gradients of zero."""
    for call, inputs in ((adaptive_layer_norm, norm_inputs(*shape)), (gated_residual, gate_inputs(*shape))):
        out, *gradients = with_gradients(call, inputs, backend="torch")
        assert out.shape == shape
        assert [g.shape for g in gradients] == [t.shape for t in inputs.values()]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_heads(shape: tuple[int, int]) -> None:
    inputs = head_inputs(*shape, 3, 8)
    q, k, *gradients = with_gradients(qk_norm_rope, inputs, backend="torch", **turned(shape[1], 8))
    assert q.shape == k.shape == (*shape, 3, 8)
    assert [g.shape for g in gradients] == [t.shape for t in inputs.values()]
    assert not any(g.any() for g in gradients)


def test_vectors_shorter_than_eps() -> None:
    """They are divided by a constant: a gradient has no part along them."""
    q, k = (t.contiguous() * 1e-3 for t in list(head_inputs(1, 2, 2, 16).values())[:2])
    inputs = {"q": q, "k": k, "log_scale": torch.zeros(2)}
    _, _, dq, dk, dlog_scale = with_gradients(qk_norm_rope, inputs, eps=0.5, backend="torch")
    grads = [noise(1, 2, 2, 16, dtype=torch.float64, seed=9 + i).float() for i in range(2)]
    torch.testing.assert_close(dq, grads[0] / 0.5)
    torch.testing.assert_close(dk, grads[1] / 0.5)
    torch.testing.assert_close(dlog_scale, (grads[0] * q / 0.5).sum((0, 1, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulations_in_float64(dtype: torch.dtype) -> None:
    """They, and a branch, are rounded to float32; their gradients come back in float64."""
    inputs = gate_inputs(2, 40, 12, torch.float64)
    inputs["x"] = inputs["x"].to(dtype)
    out, dx, dy, dgate = with_gradients(gated_residual, inputs, backend="torch")
    assert (out.dtype, dx.dtype, dy.dtype, dgate.dtype) == (dtype, dtype, torch.float64, torch.float64)
    grad = noise(2, 40, 12, dtype=torch.float64, seed=9).to(dtype)
    assert torch.equal(dx, grad)
    torch.testing.assert_close(dy, grad.double() * inputs["gate"][:, None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dgate, (grad.double() * inputs["y"]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2)])
def test_caches_in_any_order(order: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = head_inputs(2, 5, 3, 16, dtype)
    v = noise(2, 5, 3, 16, dtype=dtype, seed=4)
    places = [order.index(i) for i in range(4)]
    shape = (2, 9, 3, 16)
    caches = [torch.full([shape[i] for i in order], math.nan, dtype=dtype).permute(places) for _ in range(2)]
    q = qk_norm_rope_into_cache(inputs["q"], inputs["k"], v, *caches, 3, log_scale=inputs["log_scale"], backend="torch")
    expected = qk_norm_rope(**inputs, backend="torch")
    assert torch.equal(q, expected[0])
    for cache, rows in zip(caches, (expected[1], v), strict=True):
        assert cache.shape == shape
        assert torch.equal(cache[:, 3:8], rows)
        assert cache[:, :3].isnan().all() and cache[:, 8:].isnan().all()


CACHE_BACKENDS = [each.backend for each in REGISTRY["qk_norm_rope_into_cache"] if each.devices != ("cuda",)]


@pytest.mark.parametrize("backend", CACHE_BACKENDS)
def test_autograd_sees_that_a_cache_changes(backend: str) -> None:
    q, cache, factor = noise(2, 4, 3, 8), torch.zeros(2, 8, 3, 8), torch.ones((), requires_grad=True)
    versions = cache._version
    used = (factor * cache).sum()
    qk_norm_rope_into_cache(q, q, q, cache, torch.zeros_like(cache), 0, backend=backend)
    assert cache._version > versions
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


def test_caches_have_memory_of_their_own() -> None:
    q, cache = noise(2, 4, 3, 8), torch.zeros(2, 8, 3, 8)
    shared = torch.zeros(1, 8, 3, 8).expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="into_cache: key_cache: expected memory of its own for every element"):
        qk_norm_rope_into_cache(q, q, q, shared, cache, 0)
    with pytest.raises(ValueError, match="into_cache: k: expected memory apart from key_cache, got the same storage"):
        qk_norm_rope_into_cache(q, cache[:, :4], q, cache, torch.zeros_like(cache), 1)
    with pytest.raises(ValueError, match="into_cache: v: expected memory apart from value_cache"):
        qk_norm_rope_into_cache(q, q, cache[:, :4], torch.zeros_like(cache), cache, 1)


@pytest.mark.parametrize("length", [10000, 10521])
def test_sums_over_many_rows(length: int) -> None:
    """Hundreds of parts, and gradients with a mean, whose sums grow."""
    heads = head_inputs(2, length, 2, 4)
    for call, inputs in (
        (adaptive_layer_norm, norm_inputs(1, length, 8)),
        (gated_residual, gate_inputs(1, length, 8)),
        (qk_norm_rope, heads | {"log_scale": torch.tensor([1.0, 0.5])}),
    ):
        found = []
        for dtype, backend in ((torch.float32, "torch"), (torch.float32, "reference"), (torch.float64, "reference")):
            leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
            results = call(**leaves, backend=backend)
            results = [results] if isinstance(results, torch.Tensor) else results
            grads = [1 + noise(*r.shape, dtype=dtype, seed=5 + i) / 4 for i, r in enumerate(results)]
            found.append(torch.autograd.grad(results, list(leaves.values()), grads))
        for got, plain, exact in zip(*found, strict=True):
            assert_as_accurate(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_any_layout_and_dtype(dtype: torch.dtype) -> None:
    inputs, (cos, sin) = head_inputs(2, 5, 3, 16), turned(5, 16)["rope"]
    cos, sin = cos.to(dtype), sin.to(dtype)
    expected = with_gradients(qk_norm_rope, inputs, backend="torch", rope=(cos.float(), sin.float()))
    for rope in ((cos, sin), (cos.mT.contiguous().mT, torch.stack([sin, sin], -1)[..., 0])):
        found = with_gradients(qk_norm_rope, inputs, backend="torch", rope=rope)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_largest_scale() -> None:
    """Just above log 100, to which float32 rounds it, there is no gradient; just below there is."""
    above = torch.tensor(math.log(100))
    scales = torch.stack([above, torch.nextafter(above, torch.tensor(0.0))])
    for backend in ("torch", "reference"):
        inputs = {"q": noise(1, 2, 2, 4), "k": noise(1, 2, 2, 4), "log_scale": scales}
        gradient = with_gradients(qk_norm_rope, inputs, backend=backend)[-1]
        assert gradient[0] == 0 and gradient[1] != 0, backend


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_op_of_the_gradients_gives_all_of_them(backend: str) -> None:
    """Autograd does not ask it for that of x, which is the incoming one."""
    inputs, grad = gate_inputs(2, 5, 4), noise(2, 5, 4, seed=3)
    op = torch.ops.fastvar.gated_residual_backward
    found = op([grad], *inputs.values(), [], [True, True, True], backend)
    assert torch.equal(found[0], grad) and found[0].data_ptr() != grad.data_ptr()
    assert [t.shape for t in found[1:]] == [inputs["y"].shape, inputs["gate"].shape]
    assert (op([None], *inputs.values(), [], [True, False, False], backend)[0] == 0).all()


def test_gradients_are_not_differentiated_again() -> None:
    inputs = {name: t.requires_grad_() for name, t in gate_inputs(1, 2, 4).items()}
    (gradient,) = torch.autograd.grad(gated_residual(**inputs).square().sum(), inputs["y"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
