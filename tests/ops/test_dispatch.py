"""Which implementation runs: the wish, the environment, what "auto" takes, and what an implementation may rely on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import toy_implementation as toy
from samples import noise

from fastvar.ops import _dispatch, adaptive_layer_norm, explain, support
from fastvar.ops._dispatch import REGISTRY, Implementation
from fastvar.ops._operator import guard

NAME = "adaptive_layer_norm"
ROOT = Path(__file__).parents[2]
X, SCALE, SHIFT = noise(2, 3, 4), noise(2, 4, seed=1), noise(2, 4, seed=2)
TOY = X + SCALE[:, None]


def small(tensor: torch.Tensor) -> str | None:
    return "takes at most 2 samples; split the batch" if tensor.shape[0] > 2 else None


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the toy implementation, called "cpu", and after it the reference, which is always the last one."""

    def install(**fields: object) -> None:
        implementation = Implementation("cpu", "toy_implementation", **fields)  # type: ignore[arg-type]
        monkeypatch.setitem(REGISTRY, NAME, (implementation, REGISTRY[NAME][-1]))
        monkeypatch.setattr(_dispatch, "_warned", set())
        monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")
        toy.calls.clear()

    return install


def test_explicit_wish(install: Callable[..., None]) -> None:
    install(auto=False)
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="cpu"), TOY)
    assert toy.calls == ["forward"]
    reference = adaptive_layer_norm(X, SCALE, SHIFT, backend="reference")
    assert toy.calls == ["forward"] and not torch.equal(reference, TOY)


def test_auto_needs_leave(install: Callable[..., None]) -> None:
    reference = adaptive_layer_norm(X, SCALE, SHIFT, backend="reference")
    install(auto=False)
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
    install(auto=True)
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), TOY)
    install(auto=True, devices=("cuda",))
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)


def test_an_obstacle_is_logged_once(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(auto=True, devices=("cpu",), obstacle=small)
    x, scale, shift = (torch.cat([t, t]) for t in (X, SCALE, SHIFT))
    expected = adaptive_layer_norm(x, scale, shift, backend="reference")
    with caplog.at_level(logging.WARNING, "fastvar"):
        for _ in range(3):
            assert torch.equal(adaptive_layer_norm(x, scale, shift), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "adaptive_layer_norm: cpu is passed over: takes at most 2 samples; split the batch"
    ]
    assert toy.calls == []
    adaptive_layer_norm(X, SCALE, SHIFT)
    assert toy.calls == ["forward"]


def test_another_device_is_no_downgrade(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(auto=True, devices=("cuda",))
    with caplog.at_level(logging.WARNING, "fastvar"):
        adaptive_layer_norm(X, SCALE, SHIFT)
    assert caplog.records == []


def test_impossible_wishes(install: Callable[..., None]) -> None:
    install(devices=("cpu",), obstacle=small)
    x, scale, shift = (torch.cat([t, t]) for t in (X, SCALE, SHIFT))
    with pytest.raises(
        RuntimeError, match="adaptive_layer_norm: backend='cpu' cannot run: takes at most 2 samples; split"
    ):
        adaptive_layer_norm(x, scale, shift, backend="cpu")
    install(devices=("cuda", "xpu"))
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: runs on cuda or xpu, the tensor is on cpu"):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="cpu")
    with pytest.raises(
        RuntimeError, match="backend='triton' does not exist for this operator; there is cpu, reference"
    ):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="triton")
    with pytest.raises(ValueError, match=r"adaptive_layer_norm: backend: expected one of .* got 'gpu'"):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="gpu")


def gradients(backend: str) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (X, SCALE, SHIFT)]
    return list(torch.autograd.grad(adaptive_layer_norm(*leaves, backend=backend).sum(), leaves))


def test_own_backward(install: Callable[..., None]) -> None:
    install(auto=False)
    assert [g.unique().tolist() for g in gradients("cpu")] == [[1.0], [2.0], [3.0]]
    assert toy.calls == ["forward", "backward"]


def test_without_a_backward_the_forward_is_differentiated(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(auto=False)
    monkeypatch.delattr(toy, "backward")
    assert [g.unique().tolist() for g in gradients("cpu")] == [[1.0], [3.0], [0.0]]
    assert toy.calls == ["forward", "forward"]


@pytest.mark.parametrize("own_backward", [True, False])
def test_autocast_stays_outside(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, own_backward: bool
) -> None:
    install(auto=False)
    if not own_backward:
        monkeypatch.delattr(toy, "backward")
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ X.mT).dtype == torch.bfloat16
        assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="cpu"), TOY)
        gradients("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert toy.calls == ["forward", "forward", "backward" if own_backward else "forward"]


def test_explain(install: Callable[..., None]) -> None:
    install(auto=False)
    told = explain(NAME, X)
    assert told.backend == "reference"
    assert str(told).splitlines() == [
        "adaptive_layer_norm: reference",
        "  cpu: only on explicit request: no recorded run shows that it pays",
        "  reference: chosen",
    ]
    assert explain(NAME, X, "cpu").reasons == {"cpu": "chosen", "reference": "can run, another one comes first"}
    install(auto=True, devices=("cpu",), obstacle=small)
    told = explain(NAME, torch.cat([X, X]))
    assert told.reasons == {"cpu": "takes at most 2 samples; split the batch", "reference": "chosen"}
    told = explain(NAME, torch.cat([X, X]), "cpu")
    assert (
        told.backend == "none: adaptive_layer_norm: backend='cpu' cannot run: takes at most 2 samples; split the batch"
    )
    with pytest.raises(ValueError, match=r"explain: op: expected one of .*'adaptive_layer_norm'.* got 'layer_norm'"):
        explain("layer_norm", X)
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain(NAME, X, "gpu")


def test_explaining_is_no_downgrade(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(auto=True, devices=("cpu",), obstacle=small)
    with caplog.at_level(logging.WARNING, "fastvar"):
        explain(NAME, torch.cat([X, X]))
    assert caplog.records == []


def test_support(install: Callable[..., None]) -> None:
    install(devices=("cpu", "cuda"), verified=("H200",))
    rows = [row for row in support().rows if row[0] == NAME]
    assert rows == [(NAME, "cpu", "cpu, cuda", "H200"), (NAME, "reference", "any", "CPU")]
    assert {row[0] for row in support().rows} == set(REGISTRY)
    assert f"| {NAME} | cpu | cpu, cuda | H200 |" in support().markdown().splitlines()
    assert len(str(support()).splitlines()) == len(support().rows)


def test_environment_is_the_default(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(auto=False)
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "cpu")
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), TOY)
    assert not torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="reference"), TOY)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("reference", "reference"),
        ("cuda", "RuntimeError: adaptive_layer_norm: backend='cuda' does not exist"),
        ("gpu", "FASTVAR_BACKEND: expected one of"),
    ],
)
def test_environment_variable(wish: str, expected: str) -> None:
    code = (
        "import torch; from fastvar.ops import adaptive_layer_norm, explain\n"
        "x = torch.zeros(1, 2, 3); print(explain('adaptive_layer_norm', x).backend)\n"
        "adaptive_layer_norm(x, x[:, 0], x[:, 0])"
    )
    environment = {**os.environ, "FASTVAR_BACKEND": wish}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode == 0) == (wish == "reference")
    assert expected in (run.stdout if wish == "reference" else run.stderr)


def test_kernels_are_launched_on_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for name in ("cuda:0", "cuda:1", "cpu"):
        with guard(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]
