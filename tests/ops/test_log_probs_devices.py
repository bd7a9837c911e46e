"""Log-probabilities and the losses made of them on a device without memory: what they wait for, and what they hold."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar import ScaleSchedule
from fastvar.ops.cross_entropy import CrossEntropyCall
from fastvar.ops.policy_loss import PolicyLossCall, PolicyLossOptions
from fastvar.ops.token_log_probs import Head
from tests.helpers.samples import SAMPLES, moved, noise

NAMES = ("token_log_probs", "cross_entropy", "policy_loss")
CALLS = [(name, i) for name in NAMES for i, _ in enumerate(SAMPLES[name](torch.float32))]
SMALL_CONSTANTS = ("tensor", "as_tensor", "new_tensor", "scalar_tensor")


class Waits(TorchFunctionMode):
    """Refuses tensors made of numbers: they are copied to the device, which waits for it. What reads a tensor's numbers
    fails by itself, as there are none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in SMALL_CONSTANTS, f"{func.__name__} copies to the device"
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Refuses copies from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1 if func is torch.ops.aten.copy_.default else 0]
            assert source.device.type == result.device.type, f"{func} copies to the device"
        return result


@pytest.mark.parametrize(("name", "index"), CALLS)
def test_nothing_waits_for_the_device(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; what is made once may wait."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # does not know the device
    function, arguments, names = list(SAMPLES[name](torch.float32))[index]
    arguments = {key: moved(value, "meta") for key, value in arguments.items()}
    function(**arguments, backend="reference")
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    with Waits(), Copies():
        found = function(**arguments | leaves, backend="reference")
        next(r for r in found if isinstance(r, torch.Tensor) and r.requires_grad).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at a time."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.live = {t.untyped_storage()._cdata: 0 for t in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


VAR_256 = ScaleSchedule.parse("var-256")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module in Triton, its kernels left out."""
    pytest.importorskip("triton")
    from fastvar.kernels.common.launching import Kernel

    monkeypatch.setattr(Kernel, "launch", lambda *_: None)
    module = importlib.import_module("fastvar.kernels.token_log_probs.impl_triton")
    monkeypatch.setattr(module, "_adds_wide", lambda *_: True)
    return module


def call_of(head: Head, tokens: torch.Tensor, schedule: ScaleSchedule, **changes: Any) -> PolicyLossCall:
    """A call of `policy_loss` for all gradients, with its other tensors."""
    values, advantages = (empty(*s, dtype=torch.float32) for s in (tokens.shape[:2], tokens.shape[:1]))
    call = PolicyLossCall(
        head=head,
        tokens=tokens,
        advantages=advantages,
        schedule=schedule,
        options=PolicyLossOptions(kl_weight=0.1, kl_estimator="k3"),
        old_log_probs=values,
        reference_log_probs=values,
        reference=None,
        token_mask=values,
        mask_totals=None,
        first_scale=0,
        temperature=1.0,
        needs=(True,) * 3,
    )
    return call._replace(**changes)


# A third of what Liger-Kernel's loss on logits held on an H200, in MiB, in the same settings.
@pytest.mark.parametrize(("size", "width", "most"), [(4096, 1920, 806.7 / 3), (16384, 1024, 1908.3 / 3)])
def test_memory_of_a_training_pass(size: int, width: int, most: float, scores: Any) -> None:
    length = VAR_256.num_tokens
    hidden, weight, bias = empty(64, length, width), empty(size, width), empty(size)
    call = call_of(Head(hidden, weight, bias), empty(64, length, dtype=torch.int64), VAR_256)
    given = (*call.head, *(t for t in call if isinstance(t, torch.Tensor)))
    scores.policy_loss(call)
    with Held(*given) as held:
        results = scores.policy_loss(call)
    print(f"{size}, {width}: {held.most / 2**20:.1f} MiB, kept {held.now / 2**20:.1f}")
    assert hidden.nbytes + 4 * weight.numel() < held.most <= most * 2**20
    del results
    with Held(*given) as held:
        results = scores.policy_loss(call._replace(needs=(False,) * 3))
    assert held.most <= most * 2**20 / 2 and not any(t.numel() for t in results[-3:])


def test_triton_waits_for_nothing(scores: Any) -> None:
    for level in ("token", "sample"):
        length, options = VAR_256.num_tokens, PolicyLossOptions(ratio_level=level, kl_weight=0.1, kl_estimator="k3")
        for dtype in (torch.bfloat16, torch.float16):
            hidden, weight, bias = (empty(*s, dtype=dtype) for s in ((3, length, 16), (50, 16), (50,)))
            for tokens in (empty(3, length, dtype=torch.int64), empty(3, length, 50, dtype=torch.bool)):
                head, needs = Head(hidden, weight, bias), (True,) * 3
                call = call_of(head, tokens, VAR_256, reference=head, options=options)
                for _ in range(2):
                    scores.policy_loss(call)
                    with Waits(), Copies():
                        scores.policy_loss(call)
                        scores.cross_entropy(CrossEntropyCall(head, tokens, call.old_log_probs, 0.1, needs))


def test_launches_have_one_axis(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the others CUDA allows 65,535 blocks."""
    from fastvar.kernels.common.launching import Kernel

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, grid, *_: grids.append(grid))
    hidden, tokens = empty(65_536, 5, 7), empty(65_536, 5, dtype=torch.int64)
    options = PolicyLossOptions(ratio_level="sample", kl_weight=0.1, kl_estimator="k3")
    call = call_of(Head(hidden), tokens, ScaleSchedule((1, 2)), needs=(True, False, False), options=options)
    scores.policy_loss(call)
    assert len(grids) > 5 and all(len(grid) == 1 for grid in grids)


def test_a_graph_that_is_kept_gives_the_gradient_again() -> None:
    """Otherwise it is multiplied in place, and a second backward pass is refused."""
    from fastvar.ops import cross_entropy

    hidden, weight = noise(2, 5, 4).requires_grad_(), noise(7, 4, seed=1).requires_grad_()
    loss = cross_entropy(hidden, weight, None, torch.arange(10).view(2, 5) % 7).loss
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_incoming_gradient_is_not_rounded(dtype: torch.dtype) -> None:
    """Nor are float16 gradients lost that a loss scale would bring back."""
    from fastvar.ops import cross_entropy

    hidden, weight = noise(2, 500, 4, dtype=dtype), noise(7, 4, dtype=dtype, seed=1)
    tokens = torch.arange(1000).view(2, 500) % 7

    def gradients(*leaves: torch.Tensor, factor: float) -> tuple[torch.Tensor, ...]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        return torch.autograd.grad(factor * cross_entropy(*leaves, None, tokens).loss, leaves)

    found = gradients(hidden, weight, factor=1000 / 3)
    expected = gradients(hidden.double(), weight.double(), factor=1000 / 3)
    for a, b in zip(found, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error < torch.finfo(dtype).eps / 2, error


def test_float16_gradients_below_the_least_float16() -> None:
    """A loss whose gradient is that small keeps it until the loss scale that comes in has brought it back."""
    from fastvar.ops import cross_entropy

    hidden, weight = noise(1, 16, 4, dtype=torch.float16), noise(7, 4, dtype=torch.float16, seed=1)
    tokens, weights = torch.arange(16).view(1, 16) % 7, torch.ones(16)
    weights[0] = 1e9  # of the mean: the others' gradients are near 1e-9
    for backend in ("torch", "reference"):
        leaf = hidden.clone().requires_grad_()
        loss = cross_entropy(leaf, weight, None, tokens, weights=weights, backend=backend).loss
        (found,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**26))
        assert (found[0, 1:] != 0).any(-1).all()
