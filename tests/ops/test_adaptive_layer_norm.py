"""adaptive_layer_norm and gated_residual against their definitions in float64, and both in one against them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops import adaptive_layer_norm, gated_residual, gated_residual_norm
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

SHAPES = [(2, 5, 12), (3, 1, 7), (1, 4, 1), (2, 40, 65), (2, 3, 1920)]


def defined(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    x, scale, shift = x.double(), scale.double()[:, None], shift.double()[:, None]
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def arguments(
    batch: int, length: int, width: int, dtype: torch.dtype = torch.float64, modulation: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (off centre), y, scale and shift; the latter two as neighbours in one tensor, as models hand them over."""
    scale, shift = noise(batch, 6, width, dtype=modulation or dtype).unbind(1)[2:4]
    x = (noise(batch, length, width, dtype=torch.float64) * 3 + 5).to(dtype)
    return x, noise(batch, length, width, dtype=dtype, seed=1), scale, shift


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_definition(shape: tuple[int, int, int], eps: float) -> None:
    x, y, scale, shift = arguments(*shape)
    got = adaptive_layer_norm(x, scale, shift, eps=eps)
    torch.testing.assert_close(got, defined(x, scale, shift, eps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gated_residual(x, y, scale), x + y * scale[:, None], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("modulation", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, modulation: torch.dtype) -> None:
    """Also with modulations and branches of another dtype than the residual stream, as autocast makes them."""
    x, y, scale, shift = arguments(*shape, dtype, modulation)
    plain = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    got = adaptive_layer_norm(x, scale, shift)
    assert_as_accurate(got, plain.to(dtype), defined(x, scale, shift, 1e-6))
    y = y.to(modulation)
    exact = x.double() + y.double() * scale.double()[:, None]
    assert_as_accurate(gated_residual(x, y, scale), (x + y * scale[:, None]).to(dtype), exact)


def test_one_rounding_in_bfloat16() -> None:
    """Inside all is float32: the result is the float32 result, rounded once."""
    x, y, scale, shift = arguments(2, 5, 64, torch.bfloat16)
    exact = adaptive_layer_norm(x.float(), scale.float(), shift.float())
    assert torch.equal(adaptive_layer_norm(x, scale, shift), exact.bfloat16())
    exact = gated_residual(x.float(), y.float(), scale.float())
    assert torch.equal(gated_residual(x, y, scale), exact.bfloat16())


def test_gradient_of_the_residual_is_no_copy() -> None:
    x, y, gate, _ = arguments(2, 5, 12)
    x.requires_grad_()
    grad = torch.ones_like(x)
    for inputs in ((x, y, gate), (x, y.requires_grad_(), gate)):
        assert torch.autograd.grad(gated_residual(*inputs), x, grad)[0].data_ptr() == grad.data_ptr()


def test_any_strides() -> None:
    x, y, scale, shift = arguments(2, 5, 12)

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT

    assert torch.equal(adaptive_layer_norm(transposed(x), scale, shift), adaptive_layer_norm(x, scale, shift))
    assert torch.equal(gated_residual(transposed(x), transposed(y), scale), gated_residual(x, y, scale))
    one = scale[:1].expand(2, -1)
    assert torch.equal(adaptive_layer_norm(x, one, one), adaptive_layer_norm(x, one.clone(), one.clone()))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected shape", {"x": torch.zeros(2, 12)}),
        ("x: expected a floating-point", {"x": torch.zeros(2, 5, 12, dtype=torch.int64)}),
        (r"scale: expected shape \(2, 12\)", {"scale": torch.zeros(1, 12)}),
        ("scale: expected shape", {"scale": torch.zeros(2, 1, 12)}),
        ("scale: expected a floating-point", {"scale": torch.zeros(2, 12, dtype=torch.int64)}),
        ("scale: expected cpu", {"scale": torch.zeros(2, 12, device="meta")}),
        (r"shift: expected shape \(2, 12\)", {"shift": torch.zeros(2, 11)}),
        ("shift: expected a floating-point", {"shift": torch.zeros(2, 12, dtype=torch.bool)}),
    ],
)
def test_wrong_arguments(message: str, change: dict[str, Any]) -> None:
    valid = {"x": torch.zeros(2, 5, 12), "scale": torch.zeros(2, 12), "shift": torch.zeros(2, 12)}
    with pytest.raises(ValueError, match=f"^adaptive_layer_norm: {message}"):
        adaptive_layer_norm(**{**valid, **change})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected shape", {"x": torch.zeros(2, 12)}),
        (r"y: expected shape \(2, 5, 12\)", {"y": torch.zeros(2, 4, 12)}),
        ("y: expected a floating-point", {"y": torch.zeros(2, 5, 12, dtype=torch.int64)}),
        (r"gate: expected shape \(2, 12\)", {"gate": torch.zeros(2, 5, 12)}),
        ("gate: expected a floating-point", {"gate": torch.zeros(2, 12, dtype=torch.int64)}),
        ("gate: expected cpu", {"gate": torch.zeros(2, 12, device="meta")}),
    ],
)
def test_wrong_residual(message: str, change: dict[str, Any]) -> None:
    valid = {"x": torch.zeros(2, 5, 12), "y": torch.zeros(2, 5, 12), "gate": torch.zeros(2, 12)}
    with pytest.raises(ValueError, match=f"^gated_residual: {message}"):
        gated_residual(**{**valid, **change})


def in_one(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = gated_residual(x, y, gate, **{n: v for n, v in rest.items() if n == "backend"})
    return residual, adaptive_layer_norm(residual, scale, shift, **rest)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_both_in_one(backend: str, dtype: torch.dtype, used: tuple[int, ...]) -> None:
    """The bits of the two operators one after the other, gradients of both results or of one of them too."""
    inputs = [noise(2, 40, 12, dtype=dtype, seed=i) for i in range(2)]
    inputs += noise(2, 6, 12, dtype=torch.float32, seed=2).to(dtype).unbind(1)[2:5]
    found = []
    for call in (gated_residual_norm, in_one):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results = [call(*leaves, eps=1e-3, backend=backend)[i] for i in used]
        grads = [noise(*r.shape, dtype=dtype, seed=5 + i) for i, r in enumerate(results)]
        found.append([*results, *torch.autograd.grad(results, leaves, grads, materialize_grads=True)])
    for one, apart in zip(*found, strict=True):
        assert torch.equal(one, apart)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected shape", {"x": torch.zeros(2, 12)}),
        (r"y: expected shape \(2, 5, 12\)", {"y": torch.zeros(2, 4, 12)}),
        ("y: expected cpu", {"y": torch.zeros(2, 5, 12, device="meta")}),
        (r"gate: expected shape \(2, 12\)", {"gate": torch.zeros(1, 12)}),
        ("scale: expected a floating-point", {"scale": torch.zeros(2, 12, dtype=torch.int64)}),
        (r"shift: expected shape \(2, 12\)", {"shift": torch.zeros(2, 5, 12)}),
    ],
)
def test_wrong_arguments_of_both(message: str, change: dict[str, Any]) -> None:
    valid = {"x": torch.zeros(2, 5, 12), "y": torch.zeros(2, 5, 12)}
    valid |= {name: torch.zeros(2, 12) for name in ("gate", "scale", "shift")}
    with pytest.raises(ValueError, match=f"^gated_residual_norm: {message}"):
        gated_residual_norm(**{**valid, **change})
