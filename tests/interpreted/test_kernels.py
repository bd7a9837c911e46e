"""Every Triton implementation against the reference, over the calls of the contract and over several tiles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fastvar.kernels.cached_attention import impl_triton
from triton.runtime.errors import InterpreterError

from fastvar import ScaleSchedule, ops
from fastvar.ops._dispatch import REGISTRY
from tests.helpers.samples import SAMPLES, noise

NAMES = [name for name, each in REGISTRY.items() if any(i.backend == "triton" for i in each)]
# in bfloat16 the interpreter multiplies matrices only, see bfloat16.py
DTYPES = [torch.float32, torch.float16]


def tensors(result: Any) -> list[torch.Tensor]:
    return [r for r in ((result,) if isinstance(result, torch.Tensor) else result) if isinstance(r, torch.Tensor)]


def run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    names: tuple[str, ...],
    backend: str,
    dtype: torch.dtype | None = None,
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> list[torch.Tensor]:
    """Results and gradients, with floating tensors in another dtype if one is given. For Triton's kernels new memory is
    full of NaN: all that they return was written, and nothing else was read."""
    with mock.patch("torch.empty", _poisoned) if backend == "triton" else nullcontext():
        return _run(function, arguments, names, backend, dtype, layout)


def _poisoned(*arguments: Any, empty: Callable[..., torch.Tensor] = torch.empty, **options: Any) -> torch.Tensor:
    tensor = empty(*arguments, **options)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def _run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    names: tuple[str, ...],
    backend: str,
    dtype: torch.dtype | None,
    layout: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    arguments = {key: _converted(value, dtype) for key, value in arguments.items()}
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    results = tensors(function(**arguments | dict(zip(names, leaves, strict=True)), backend=backend))
    if not names:
        return results
    carried = [r for r in results if r.requires_grad]
    weights = [layout(noise(*r.shape, dtype=torch.float64, seed=3).to(r.dtype)) for r in carried]
    return [*(r.detach() for r in results), *torch.autograd.grad(carried, leaves, weights)]


def _converted(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, tuple):
        parts = [_converted(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, torch.Tensor) and value.is_floating_point() and dtype is not None:
        return value.to(dtype)
    return value


def check(function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...], **options: Any) -> None:
    """The error against float64 is at most twice the reference's own in the arguments' dtype, plus four roundings;
    tokens, bits and masks are equal."""
    exact = run(function, arguments, names, "reference", torch.float64, **options)
    plain = run(function, arguments, names, "reference", **options)
    found = run(function, arguments, names, "triton", **options)
    for f, p, e in zip(found, plain, exact, strict=True):
        assert f.shape == p.shape and f.dtype == p.dtype and f.is_contiguous()
        if not f.is_floating_point():
            assert torch.equal(f, p)
        elif f.numel():
            unit = torch.finfo(f.dtype).eps * max(float(e.abs().amax()), 1.0)  # arguments are of order 1
            error, own = (float((t.double() - e).abs().amax()) for t in (f, p))
            assert error <= 2 * own + 4 * unit, (error, own, unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_calls_of_the_contract(name: str, dtype: torch.dtype) -> None:
    for i, sample in enumerate(SAMPLES[name](dtype)):
        print(f"sample {i}")
        check(*sample)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_layout(name: str) -> None:
    layouts = {
        "expanded": lambda g: g.flatten()[0].expand(g.shape) if g.numel() else g,
        "sliced": lambda g: torch.stack([g, g], -1)[..., 0],
        "transposed": lambda g: g.mT.contiguous().mT if g.ndim > 1 else g,
    }
    function, arguments, names = next(iter(SAMPLES[name](torch.float32)))
    for layout, turn in layouts.items():
        print(layout)
        if names:
            check(function, arguments, names, layout=turn)


def attention(grids: tuple[int, ...], heads: int, dim: int, *, group: int = 0, prefix: int = 0) -> dict[str, Any]:
    schedule = ScaleSchedule(grids)
    qkv = noise(max(group, 1) * 2, schedule.num_tokens, 3, heads, dim)
    arguments: dict[str, Any] = {"q": qkv[:, :, 0] * 2, "k": qkv[:, :, 1], "v": qkv[:, :, 2], "schedule": schedule}
    if group:
        arguments |= {
            "prefix_k": noise(2, prefix, heads, dim, seed=1),
            "prefix_v": noise(2, prefix, heads, dim, seed=2),
        }
    return arguments


def attend(prefix_k: Any = None, prefix_v: Any = None, lengths: Any = None, **arguments: Any) -> Any:
    prefix = None if prefix_k is None else ops.PrefixKV(prefix_k, prefix_v, lengths)
    return ops.block_causal_attention_with_lse(prefix=prefix, **arguments)


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize(("grids", "dim"), [((1, 2, 3, 5, 8), 16), ((1, 6, 6), 24), ((9,), 8), ((1, 1, 1), 12)])
def test_attention_over_several_tiles(grids: tuple[int, ...], dim: int, block_diagonal: bool) -> None:
    arguments = attention(grids, 1, dim) | {"block_diagonal": block_diagonal}
    check(attend, arguments, ("q", "k", "v"))


@pytest.mark.parametrize("lengths", [None, (0, 70), (33, 64), (1, 32)])
def test_attention_to_a_ragged_prefix(lengths: tuple[int, int] | None) -> None:
    """What stands behind a prefix's length is never read."""
    arguments = attention((1, 2, 6), 1, 16, group=2, prefix=70)
    if lengths is not None:
        arguments["lengths"] = torch.tensor(lengths)
        for name in ("prefix_k", "prefix_v"):
            for row, length in enumerate(lengths):
                arguments[name][row, length:] = torch.inf
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    if lengths is None:
        check(attend, arguments, names)
        return
    found = run(attend, arguments, names, "triton")
    clean = {n: t.nan_to_num(posinf=0.0) if n in names else t for n, t in arguments.items()}
    for one, other in zip(found, run(attend, clean, names, "reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def cached(n: int, samples: int = 4) -> dict[str, Any]:
    """A prefix longer than a program takes, shared by two samples, a trunk for two forks, and own keys."""
    cache = noise(4, 90, 2, 1, 16)[:samples]
    trunk = noise(2, 40, 2, 1, 16, seed=1)[: samples // 2]
    prefix = noise(2, 70, 2, 1, 16, seed=2)[: samples // 2]
    lengths = torch.tensor([70, 0])[: samples // 2]
    return {
        "q": 2 * noise(4, 90, 1, 16)[:samples, :n],
        "k": cache[:, :80, 0],
        "v": cache[:, :80, 1],
        "prefix": ops.PrefixKV(prefix[:, :, 0], prefix[:, :, 1], lengths),
        "trunk": ops.PrefixKV(trunk[:, :, 0], trunk[:, :, 1]),
    }


@pytest.mark.parametrize("n", [1, 5, 70])
def test_cached_attention_of_few_and_many_queries(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl_triton, "SPLIT", 64)
    check(ops.cached_attention, cached(n), ())
    alone = {"prefix": None, "trunk": None}
    check(ops.cached_attention, cached(n) | alone, ())
    # the same bits in a smaller batch
    larger, smaller = (ops.cached_attention(**cached(n, samples), backend="triton") for samples in (4, 2))
    assert torch.equal(larger[:2], smaller)


def test_rows_of_normalisations_over_several_tiles() -> None:
    x, scale, shift = noise(2, 70, 40), noise(2, 40, seed=1), noise(2, 40, seed=2)
    check(ops.adaptive_layer_norm, {"x": x, "scale": scale, "shift": shift}, ("x", "scale", "shift"))
    y = noise(2, 70, 40, seed=3)
    check(ops.gated_residual, {"x": x, "y": y, "gate": scale}, ("x", "y", "gate"))
    schedule = ScaleSchedule((1, 4, 5))
    arguments = {"q": noise(2, 42, 3, 12), "k": noise(2, 42, 3, 12, seed=1), "log_scale": noise(3)}
    check(ops.qk_norm_rope, arguments | {"rope": ops.rope_tables(schedule, 12)}, ("q", "k", "log_scale"))


def test_a_row_of_zeros_has_no_gradient_of_its_length() -> None:
    q = noise(1, 3, 1, 4)
    q[0, 1] = 0
    check(ops.qk_norm_rope, {"q": q, "k": q.clone(), "log_scale": torch.zeros(1), "eps": 0.1}, ("q", "k"))


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place, place < n, 0.0), place < n)


def test_the_bounds_check_itself() -> None:
    x, y = torch.ones(5), torch.zeros(5)
    _copy[(1,)](x, y, 5, BLOCK=8)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match=r"OutOfBounds.*load: 1 of 6 lanes"):
        _copy[(1,)](x, y, 6, BLOCK=8)
