"""Operators over rows in Triton: tensors whose parts lie far apart, caches of any layout, rows of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvar import ScaleSchedule, ops
from tests.helpers.samples import noise
from tests.interpreted.test_kernels import check


def spread(values: torch.Tensor, axis: int, gap: int) -> torch.Tensor:
    """The same with so many elements from one index of an axis to the next, in memory that is hardly touched."""
    strides, step = [0] * values.ndim, 1
    for i in reversed(range(values.ndim)):
        if i != axis:
            strides[i] = step
            step *= values.shape[i]
    strides[axis] = gap
    memory = torch.empty(gap * (values.shape[axis] - 1) + step, dtype=values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(("axis", "gap"), [(0, 2**31), (1, 2**30), (2, 2**30), (3, 2**28)])
def test_heads_that_lie_far_apart(axis: int, gap: int) -> None:
    q, k, v = (noise(2, 3, 3, 16, seed=i).half() for i in range(3))
    scale = torch.zeros(3)
    wide = spread(k, axis, gap)
    for a, b in zip(
        ops.qk_norm_rope(q, wide, log_scale=scale, backend="triton"),
        ops.qk_norm_rope(q, k, log_scale=scale, backend="triton"),
        strict=True,
    ):
        assert torch.equal(a, b)
    cache = spread(torch.zeros(2, 4, 3, 16).half(), axis, gap)
    expected = torch.zeros(2, 2, 4, 3, 16).half()
    for caches in ((cache, expected[0]), (expected[1], torch.zeros_like(cache))):
        ops.qk_norm_rope_into_cache(q, wide, v, *caches, 1, log_scale=scale, backend="triton")
    assert torch.equal(cache, expected[1])


@pytest.mark.parametrize("dim", [1, 2, 6, 15, 104])
def test_heads_of_any_size(dim: int) -> None:
    qkv = noise(2, 14, 3, 3, dim)
    arguments = {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "log_scale": noise(3)}
    if dim % 2 == 0:
        angle = noise(14, dim // 2, seed=1)
        arguments["rope"] = (angle.cos(), angle.sin())
    check(ops.qk_norm_rope, arguments, ("q", "k", "log_scale"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2)])
def test_caches_in_any_order(order: tuple[int, int, int, int]) -> None:
    q, k, v = noise(2, 5, 3, 3, 16).unbind(2)
    rope = ops.rope_tables(ScaleSchedule((1, 2)), 16)
    places, shape = [order.index(i) for i in range(4)], (2, 9, 3, 16)
    caches = [torch.full([shape[i] for i in order], torch.nan).permute(places) for _ in range(2)]
    got = ops.qk_norm_rope_into_cache(q, k, v, *caches, 3, rope=rope, backend="triton")
    expected = ops.qk_norm_rope(q, k, rope=rope, backend="triton")
    assert torch.equal(got, expected[0])
    for cache, rows in zip(caches, (expected[1], v), strict=True):
        assert torch.equal(cache[:, 3:8], rows)
        assert cache[:, :3].isnan().all() and cache[:, 8:].isnan().all()


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("log_scale",), ("q", "log_scale")])
def test_gradients_of_one_result(wanted: tuple[str, ...]) -> None:
    """The other one has no part in the loss: zeros, or nothing where it is not asked for."""
    for chosen in range(2):
        arguments = {"q": noise(2, 5, 3, 8), "k": noise(2, 5, 3, 8, seed=1), "log_scale": noise(3)}
        found = []
        for backend in ("triton", "reference"):
            leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in arguments.items()}
            result = ops.qk_norm_rope(**leaves, backend=backend)[chosen]
            (result * noise(*result.shape, seed=2)).sum().backward()
            found.append([leaves[n].grad for n in wanted])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("axis", "gap"), [(0, 2**31), (1, 2**30), (2, 2**28)])
def test_channels_that_lie_far_apart(axis: int, gap: int) -> None:
    x, y = noise(2, 3, 16).half(), noise(2, 3, 16, seed=1).half()
    modulation = noise(2, 16).half()
    wide = spread(x, axis, gap)

    def results(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(), modulation.clone().requires_grad_(), y.detach().requires_grad_()]
        normed = ops.adaptive_layer_norm(leaves[0], leaves[1], modulation, backend="triton")
        gated = ops.gated_residual(leaves[0], leaves[2], leaves[1], backend="triton")
        grads = [spread(noise(2, 3, 16, seed=2).half(), axis, gap if x is wide or y is wide else 48)] * 2
        return [normed, gated, *torch.autograd.grad([normed, gated], leaves, grads)]

    expected = results(x, y)
    for found in (results(wide, y), results(x, spread(y, axis, gap))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("axis", "gap"), [(0, 2**31), (1, 2**30), (2, 2**28)])
def test_groups_of_channels_that_lie_far_apart(axis: int, gap: int) -> None:
    x, grad, weight = noise(2, 3, 16).half(), noise(2, 3, 16, seed=1).half(), noise(16, seed=2)
    found = []
    for rows, gradient in ((x, grad), (spread(x, axis, gap), grad), (x, spread(grad, axis, gap))):
        leaf = rows.detach().requires_grad_()
        result = ops.group_norm_silu(leaf, weight, weight, groups=2, backend="triton")
        found.append([result, *torch.autograd.grad(result, leaf, gradient)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("axis", "gap"), [(0, 2**31), (1, 2**30), (2, 2**27)])
def test_logits_and_masks_that_lie_far_apart(axis: int, gap: int) -> None:
    logits, others, seeds = noise(2, 3, 20), noise(2, 3, 20, seed=1), torch.arange(2)
    options: dict[str, Any] = {"seeds": seeds, "log_probs": True, "backend": "triton", "guidance": 1.5, "top_k": 7}
    far, far_others = spread(logits, axis, gap), spread(others, axis, gap)
    for draw, rest in ((ops.sample_tokens, options), (ops.sample_bits, {**options, "top_k": 2})):
        for a, b in zip(
            draw(far, unconditional=far_others, **rest), draw(logits, unconditional=others, **rest), strict=True
        ):
            assert torch.equal(a, b)
    masks, schedule = noise(2, 3, 4), ScaleSchedule((1, (3, 4)))
    for soft in (False, True):
        given = masks.clamp(0, 1)
        wanted = ops.propagate_mask(given, schedule, soft=soft, backend="triton")
        assert torch.equal(ops.propagate_mask(spread(given, axis, gap), schedule, soft=soft, backend="triton"), wanted)


def in_two(x: Any, y: Any, gate: Any, scale: Any, shift: Any, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    residual = ops.gated_residual(x, y, gate, backend=backend)
    return residual, ops.adaptive_layer_norm(residual, scale, shift, backend=backend)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("wanted", [range(5), (0,), (2,), (1, 4)])
def test_residual_and_norm_in_one(wanted: tuple[int, ...], used: tuple[int, ...]) -> None:
    """The bits of both apart, over several parts of the rows, whatever gradients are asked for."""
    dtype = torch.float16
    inputs = [noise(1, 40, 40, dtype=dtype, seed=i) for i in range(2)]
    inputs += noise(1, 6, 40, dtype=dtype, seed=2).unbind(1)[2:5]
    found = []
    for call in (ops.gated_residual_norm, in_two):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        every = call(*leaves, backend="triton")
        results = [every[i] for i in used]
        grads = [noise(*r.shape, dtype=dtype, seed=5 + i) for i, r in enumerate(results)]
        asked = [leaves[i] for i in wanted]
        found.append([*every, *torch.autograd.grad(results, asked, grads, materialize_grads=True)])
    for one, apart in zip(*found, strict=True):
        assert torch.equal(one, apart)


@pytest.mark.parametrize("width", [1, 15, 40, 600])
def test_channels_of_any_number(width: int) -> None:
    x, y = noise(2, 35, width) * 3 + 5, noise(2, 35, width, seed=1)
    gate, scale, shift = noise(2, 6, width, seed=2).unbind(1)[1:4]
    arguments = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}
    check(ops.gated_residual_norm, arguments, tuple(arguments))
