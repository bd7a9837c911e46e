"""token_log_probs against whole logits, its memory, and its independence of the batch."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastvar.kernels.token_log_probs.losses import Scoring, Wanted
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar.ops import sample_bits, sample_tokens, token_log_probs
from fastvar.ops.token_log_probs import Head
from tests.helpers.samples import noise

BACKENDS = ["torch", "reference"]


def naive(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    reference_head: tuple[Any, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The definition, with the logits of all rows in memory; bits as vocabularies of two."""
    heads = [(hidden, weight, bias)] + ([reference_head] if reference_head is not None else [])
    logs = []
    for states, matrix, offset in heads:
        logits = (states if matrix is None else F.linear(states, matrix, offset)) / temperature
        logs.append((torch.stack([-logits / 2, logits / 2], -1) if tokens.ndim == 3 else logits).log_softmax(-1))
    own = logs[0].gather(-1, tokens.long()[..., None])[..., 0]
    found = [own, -(logs[0].exp() * logs[0]).sum(-1)]
    if reference_head is not None:
        found.append((logs[0].exp() * (logs[0] - logs[1].detach())).sum(-1))
    return tuple(f.sum(-1) if tokens.ndim == 3 else f for f in found)


def problem(
    batch: int, length: int, width: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    hidden = noise(batch, length, width, dtype=dtype) * 2
    weight, bias = noise(size, width, dtype=dtype, seed=1), noise(size, dtype=dtype, seed=2)
    tokens = torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(0))
    return hidden, weight, bias, tokens


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's chunks are 64 rows."""
    module = importlib.import_module("fastvar.kernels.token_log_probs.impl_torch")
    monkeypatch.setattr(module, "ROWS", 64)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("kind", ["hidden", "without bias", "logits"])
def test_equals_the_definition(kind: str, bits: bool, backend: str) -> None:
    """Values and gradients of all three results, over several chunks and a padded one."""
    hidden, weight, bias, tokens = problem(3, 201, 8, 11)
    if bits:
        tokens = noise(3, 201, 11) > 0
    other = (noise(3, 201, 5, dtype=torch.float64, seed=4), noise(11, 5, dtype=torch.float64, seed=5), None)
    leaves = {"hidden": hidden, "without bias": hidden, "logits": F.linear(hidden, weight)}[kind], weight, bias
    leaves = leaves[: {"hidden": 3, "without bias": 2, "logits": 1}[kind]]
    gradients = [noise(3, 201, dtype=torch.float64, seed=s) for s in (6, 7, 8)]

    def run(function: Any) -> tuple[Any, Any]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        head = (*own, *(None,) * (3 - len(own)))
        results = function(*head, tokens, temperature=0.7, reference_head=other)
        return results, torch.autograd.grad(tuple(results), own, gradients)

    for got, expected in zip(run(partial(token_log_probs, backend=backend)), run(naive), strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_float32_statistics(dtype: torch.dtype, backend: str) -> None:
    """Products of rounded inputs are exact in float32: results are those of float32 on the rounded inputs."""
    hidden, weight, bias, tokens = problem(2, 20, 16, 40, dtype)
    score = partial(token_log_probs, backend=backend)
    got = score(hidden, weight, bias, tokens)
    expected = score(hidden.float(), weight.float(), bias.float(), tokens)
    assert got.log_probs.dtype == torch.float32
    assert torch.equal(got.log_probs, expected.log_probs)
    assert torch.equal(got.entropy, expected.entropy)
    float32_head = score(hidden, weight.float(), bias.float(), tokens)
    assert torch.equal(float32_head.log_probs, expected.log_probs)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    grads = torch.autograd.grad(score(*leaves, tokens).log_probs.sum(), leaves)
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = torch.autograd.grad(naive(*exact, tokens)[0].sum(), exact)
    for g, w in zip(grads, wanted, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    leaves = [hidden.clone().requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_()]
    grads = torch.autograd.grad(score(*leaves, tokens).log_probs.sum(), leaves)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2 * torch.finfo(g.dtype).eps, atol=1e-4)


def test_autocast_rounds_the_product_only() -> None:
    hidden, weight, bias, tokens = problem(2, 20, 16, 40, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = token_log_probs(hidden, weight, bias, tokens)
    expected = token_log_probs(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), tokens)
    assert torch.equal(got.log_probs, expected.log_probs)
    assert got.log_probs.dtype == torch.float32
    got.log_probs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    logits = F.linear(hidden, weight, bias).detach()
    with torch.autocast("cpu", torch.bfloat16):
        inside = token_log_probs(logits, None, None, tokens)
    assert torch.equal(inside.log_probs, token_log_probs(logits, None, None, tokens).log_probs)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an op inside it returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("bits", [False, True])
def test_whole_logits_never_exist(bits: bool) -> None:
    module = importlib.import_module("fastvar.kernels.token_log_probs.impl_torch")
    batch, length, width, size = 32, 256, 8, 64 if bits else 4096
    hidden, weight, bias, tokens = problem(batch, length, width, size, torch.float32)
    if bits:
        hidden, tokens = hidden.bfloat16(), noise(batch, length, size) > 0
        weight, bias = weight.bfloat16(), bias.bfloat16()
    scoring = Scoring(Head(hidden, weight, bias), tokens, Head(hidden, weight, bias), mean=True)
    gradients = [torch.ones(batch, length)] * 4
    with LargestTensor() as largest:
        module.score(scoring)
        module.gradients(scoring, gradients, Wanted(True, True, True))
    inputs = max(hidden.numel(), weight.numel(), tokens.numel() if bits else 0)
    assert largest.numel <= max(inputs, module.ROWS * size if bits else module.LOGITS)
    assert bits or largest.numel < batch * length * size / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(("width", "size"), [(64, 100), (33, 257), (16, 1500)])
def test_rows_do_not_depend_on_the_batch(width: int, size: int, bits: bool, backend: str) -> None:
    """A row alone is bit-equal to the same row anywhere in a batch, and so is its gradient."""
    hidden, weight, bias, tokens = problem(7, 90, width, size, torch.float32)
    if bits:
        tokens = noise(7, 90, size) > 0
    other = (noise(7, 90, 9, seed=4), noise(size, 9, seed=5), None)

    def run(rows: slice, columns: slice) -> list[torch.Tensor]:
        leaf = hidden[rows, columns].clone().requires_grad_()
        reference = (other[0][rows, columns], *other[1:])
        results = token_log_probs(leaf, weight, bias, tokens[rows, columns], reference_head=reference, backend=backend)
        (gradient,) = torch.autograd.grad(sum(r.sum() for r in results), leaf)
        return [*(r.detach() for r in results), gradient]

    whole = run(slice(None), slice(None))
    for rows, columns in [(slice(0, 1), slice(0, 1)), (slice(4, 5), slice(None)), (slice(2, 6), slice(17, 48))]:
        for alone, all_rows in zip(run(rows, columns), whole, strict=True):
            assert torch.equal(alone, all_rows[rows, columns])


def test_agrees_with_the_samplers() -> None:
    """What a rollout records is what training computes."""
    logits = noise(3, 10, 20)
    tokens, log_probs, _ = sample_tokens(logits, top_k=4, temperature=0.8, seeds=torch.arange(3), log_probs=True)
    torch.testing.assert_close(token_log_probs(logits, None, None, tokens, temperature=0.8).log_probs, log_probs)
    bits, log_probs, _ = sample_bits(logits, top_p=0.9, temperature=0.8, seeds=torch.arange(3), log_probs=True)
    torch.testing.assert_close(token_log_probs(logits, None, None, bits, temperature=0.8).log_probs, log_probs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_policies_have_no_kl(backend: str) -> None:
    """Exactly zero, value and gradient, for tokens and bits."""
    hidden, weight, bias, tokens = problem(2, 20, 16, 40, torch.float32)
    for picked in (tokens, noise(2, 20, 40) > 0):
        leaf = hidden.clone().requires_grad_()
        reference = (hidden, weight, bias)
        kl = token_log_probs(leaf, weight, bias, picked, reference_head=reference, backend=backend).kl
        assert kl is not None and (kl == 0).all()
        kl.sum().backward()
        assert leaf.grad is not None and (leaf.grad == 0).all()


def test_nan_stays_nan_and_alone() -> None:
    hidden, weight, bias, tokens = problem(1, 20, 4, 9, torch.float32)
    hidden[0, 3] = math.nan
    for backend in BACKENDS:
        result = token_log_probs(hidden, weight, bias, tokens, backend=backend)
        for values in result[:2]:
            assert values[0].isnan().nonzero().tolist() == [[3]]


def test_reference_gets_no_gradient() -> None:
    hidden, weight, bias, tokens = problem(2, 3, 4, 5)
    other = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    leaf = hidden.clone().requires_grad_()
    kl = token_log_probs(leaf, 2 * weight, bias, tokens, reference_head=tuple(other)).kl
    assert kl is not None
    kl.sum().backward()
    assert leaf.grad is not None and all(t.grad is None for t in other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite(backend: str) -> None:
    score = partial(token_log_probs, backend=backend)
    logits = torch.tensor([[[-math.inf, 0.0, 1.0, -math.inf], [1e4, -1e4, 0.0, 0.0]]])
    leaf = logits.clone().requires_grad_()
    result = score(leaf, None, None, torch.tensor([[2, 0]]), reference_head=(logits, None, None))
    pair = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(result.entropy[0, 0], -(pair.exp() * pair).sum())
    (gradient,) = torch.autograd.grad(sum(r.sum() for r in result), leaf)
    assert torch.isfinite(gradient).all()
    bits = torch.tensor([[[True, False], [True, False]]])
    leaf = torch.tensor([[[200.0, 200.0], [-200.0, 0.0]]], requires_grad=True)
    result = score(leaf, None, None, bits, reference_head=(-leaf.detach(), None, None))
    torch.testing.assert_close(result.log_probs, torch.tensor([[-200.0, -200.0 - math.log(2)]]))
    torch.testing.assert_close(result.kl, torch.tensor([[400.0, 200.0]]))
    (gradient,) = torch.autograd.grad(sum(r.sum() for r in result), leaf)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3)}, "hidden: expected shape"),
        ({"hidden": torch.zeros(2, 3, 4).long()}, "hidden: expected a floating-point tensor"),
        ({"weight": torch.zeros(5, 3)}, r"weight: expected shape \(V, 4\)"),
        ({"weight": torch.zeros(5, 4).double()}, "weight: expected torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \(5\)"),
        ({"weight": None}, "bias: expected None"),
        ({"tokens": torch.zeros(2, 2).long()}, "tokens: expected shape"),
        ({"tokens": torch.zeros(2, 3)}, "tokens: expected int64"),
        ({"tokens": torch.zeros(2, 3, 4).bool()}, r"tokens: expected shape \(2, 3, 5\)"),
        ({"tokens": torch.zeros(2, 3, 5)}, "tokens: expected int64"),
        ({"tokens": torch.full((2, 3), 5)}, "tokens: expected values from 0 to 4, got 5 to 5"),
        ({"tokens": torch.full((2, 3), -1)}, "tokens: expected values from 0 to 4"),
        ({"tokens": torch.full((2, 3, 5), 2)}, "tokens: expected values from 0 to 1"),
        ({"temperature": 0.0}, "temperature: expected 1e-12 to 1e"),
        ({"reference_head": (torch.zeros(2, 3, 4), torch.zeros(6, 4), None)}, "reference_head weight: expected shape"),
        ({"reference_head": (torch.zeros(2, 3, 4), None, None)}, "reference_head hidden: expected shape"),
        ({"reference_head": (torch.zeros(2, 3, 4), None)}, "reference_head: expected"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "bias": torch.zeros(5),
        "tokens": torch.zeros(2, 3).long(),
        **change,
    }
    with pytest.raises(ValueError, match=f"token_log_probs: {message}"):
        token_log_probs(**arguments)


def test_weights_of_any_layout_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are contiguous before they are multiplied: products of slices take a thousand times as long."""
    module = importlib.import_module("fastvar.kernels.token_log_probs.impl_torch")
    product, layouts = module._product, []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        layouts.append(weight.is_contiguous())
        return product(x, weight, bias)

    monkeypatch.setattr(module, "_product", noted)
    hidden, weight, tokens = noise(1, 64, 64), noise(1030, 64), torch.arange(64)[None]
    expected = token_log_probs(hidden, weight, None, tokens)
    for other in (weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :64]):
        assert not other.is_contiguous()
        got = token_log_probs(hidden, other, None, tokens)
        assert torch.equal(got.log_probs, expected.log_probs) and torch.equal(got.entropy, expected.entropy)
    assert layouts and all(layouts)
