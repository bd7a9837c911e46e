"""On a GPU every implementation gives what the reference gives on a CPU, without waiting for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import SAMPLES

from fastvar.ops._dispatch import REGISTRY

PACKAGES = ("sdpa", "flex", "flash_attn", "xformers")  # take less than all calls: test_attention_packages.py
IMPLEMENTATIONS = [
    (name, implementation.backend)
    for name in SAMPLES
    for implementation in REGISTRY[name]
    if (not implementation.devices or "cuda" in implementation.devices) and implementation.backend not in PACKAGES
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds the inputs of float32 convolutions to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(value: Any, device: str) -> Any:
    """The same on another device, in named and plain tuples too."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def tensors(result: Any) -> list[torch.Tensor]:
    return [r for r in ((result,) if isinstance(result, torch.Tensor) else result) if isinstance(r, torch.Tensor)]


def run(
    function: Any, arguments: dict[str, Any], names: tuple[str, ...], device: str, backend: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients, on the CPU. In a second call nothing may wait for the device."""
    arguments = {key: moved(value, device) for key, value in arguments.items()}
    function(**arguments, backend=backend)  # what is made once for a device may wait for it
    leaves = [arguments[key].detach().requires_grad_() for key in names]
    arguments |= dict(zip(names, leaves, strict=True))
    mode = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    if mode is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        results = tensors(function(**arguments, backend=backend))
        outputs = [r for r in results if r.requires_grad]
        gradients: tuple[torch.Tensor, ...] = ()
        if outputs:
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs])
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)
    return [r.detach().cpu() for r in results], [g.cpu() for g in gradients]


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    # in bfloat16 only what the interpreter cannot show; the reference is held to itself in float32
    [(*each, torch.float32) for each in IMPLEMENTATIONS]
    + [(*each, torch.bfloat16) for each in IMPLEMENTATIONS if each[1] != "reference"],
)
def test_as_on_the_cpu(name: str, backend: str, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for i, call in enumerate(SAMPLES[name](dtype)):
        print(f"sample {i}")
        found, expected = run(*call, "cuda", backend), run(*call, "cpu", "reference")
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, **tolerance)
