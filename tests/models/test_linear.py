"""Linear layers that go to oneDNN on CPUs: the same numbers as PyTorch's own, which runs where oneDNN must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvar.models.linear import Linear, linear


def _expected(x: torch.Tensor, layer: torch.nn.Linear, gelu: bool) -> torch.Tensor:
    """In float64."""
    bias = None if layer.bias is None else layer.bias.double()
    out = F.linear(x.double(), layer.weight.double(), bias)
    return F.gelu(out, approximate="tanh") if gelu else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@torch.no_grad()
def test_error_is_that_of_pytorch(dtype: torch.dtype, bias: bool, gelu: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias=bias).to(dtype)
    for shape in ((2, 1, 48), (3, 5, 48), (0, 5, 48), (7, 48)):
        x = torch.randn(shape).to(dtype)
        out = linear(x, layer.weight, layer.bias, gelu=gelu)
        assert out.shape == (*shape[:-1], 40) and out.dtype == dtype and out.is_contiguous()
        plain = F.gelu(layer(x), approximate="tanh") if gelu else layer(x)
        expected = _expected(x, layer, gelu)
        bound = 2 * (plain.double() - expected).abs() + 8 * torch.finfo(dtype).eps * (1 + expected.abs())
        assert ((out.double() - expected).abs() <= bound).all()


@torch.no_grad()
def test_strided_input() -> None:
    torch.manual_seed(0)
    layer = Linear(16, 8)
    x = torch.randn(4, 6, 32)[:, ::2, ::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    x = torch.randn(3, 1, 16).expand(3, 5, 16)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_gradients_and_autocast_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    layer, x = Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    linear(x, layer.weight, layer.bias, gelu=True).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@torch.no_grad()
def test_switched_off_it_is_pytorch_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer, x = Linear(48, 40), torch.randn(5, 48)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
