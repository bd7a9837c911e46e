"""cross_entropy against PyTorch's, from whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar.ops import cross_entropy, token_log_probs
from tests.helpers.samples import noise

BACKENDS = ["torch", "reference"]


def problem(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "hidden": noise(3, 7, 5, dtype=dtype),
        "weight": noise(11, 5, dtype=dtype, seed=1),
        "bias": noise(11, dtype=dtype, seed=2),
        "tokens": torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0)),
    }


def losses_of(hidden: Any, weight: Any, bias: Any, tokens: torch.Tensor, smoothing: float) -> torch.Tensor:
    """PyTorch's losses (B, L); bits as vocabularies of two."""
    logits = F.linear(hidden, weight, bias)
    if tokens.ndim == 3:
        pairs = torch.stack([torch.zeros_like(logits), logits], -1)
        each = F.cross_entropy(
            pairs.flatten(0, 2), tokens.flatten().long(), reduction="none", label_smoothing=smoothing
        )
        return each.view(tokens.shape).sum(-1)
    each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=smoothing)
    return each.view(tokens.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, "of a token", "of all"])
@pytest.mark.parametrize("bits", [False, True])
def test_equals_pytorch(bits: bool, weights: str | None, smoothing: float, backend: str) -> None:
    arguments = problem()
    if bits:
        arguments["tokens"] = noise(3, 7, 11) > 0
    given = {None: None, "of a token": torch.rand(7), "of all": torch.rand(3, 7)}[weights]
    leaves = {n: arguments[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    got = cross_entropy(**arguments | leaves, label_smoothing=smoothing, weights=given, backend=backend)
    expected = losses_of(**arguments | leaves, smoothing=smoothing)
    torch.testing.assert_close(got.losses, expected.detach(), rtol=1e-10, atol=1e-10)
    each = torch.ones(3, 7) if given is None else given.expand(3, 7)
    mean = (each * expected).sum() / each.sum()
    torch.testing.assert_close(got.loss, mean, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(mean, list(leaves.values()))
    for a, b in zip(torch.autograd.grad(got.loss, list(leaves.values())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    plain = token_log_probs(**arguments, backend=backend)
    assert torch.equal(got.entropy, plain.entropy)
    if smoothing == 0:
        assert torch.equal(got.losses, -plain.log_probs)


def test_all_but_the_loss_is_detached() -> None:
    arguments = problem()
    loss, *rest = cross_entropy(**arguments | {"hidden": arguments["hidden"].requires_grad_()})
    assert loss.requires_grad and not any(r.requires_grad for r in rest)


def test_nothing_to_train_is_zero() -> None:
    arguments = problem(torch.float32)
    leaf = arguments["hidden"].clone().requires_grad_()
    loss = cross_entropy(**arguments | {"hidden": leaf}, weights=torch.zeros(7)).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and (gradient == 0).all()
    empty = {n: arguments[n][:0] for n in ("hidden", "tokens")}
    assert cross_entropy(**arguments | empty, label_smoothing=0.1).loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing: expected a number from 0 to 1, got -0.1"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number from 0 to 1"),
        ({"weights": torch.zeros(3)}, r"weights: expected shape \(7\)"),
        ({"weights": torch.zeros(7, 3)}, r"weights: expected shape \(3, 7\)"),
        ({"weights": torch.zeros(7).long()}, "weights: expected a floating-point tensor"),
        ({"tokens": torch.zeros(3, 6).long()}, "tokens: expected shape"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(**problem() | change)


def test_tokens_without_weight_may_be_anything() -> None:
    hidden, weight = noise(1, 3, 8), noise(5, 8)
    expected = cross_entropy(hidden, weight, None, torch.tensor([[1, 2, 3]]), weights=torch.tensor([1.0, 0.0, 2.0]))
    hidden[0, 1] = torch.nan
    got = cross_entropy(hidden, weight, None, torch.tensor([[1, 2, 3]]), weights=torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(got.loss, expected.loss)
