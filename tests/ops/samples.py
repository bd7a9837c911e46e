"""Small valid calls of every operator, for the checks that all of them must pass (test_contract.py).

`SAMPLES[name]()` yields (public function, keyword arguments, names of the differentiable tensors). A new operator adds
an entry here and gets the whole contract; test_contract.py fails for an operator that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvar import ops

Sample = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]
SAMPLES: dict[str, Callable[[torch.dtype], Iterator[Sample]]] = {}


def sample(name: str) -> Callable[[Callable[[torch.dtype], Iterator[Sample]]], Any]:
    """Register the samples of the operator `name`."""

    def register(make: Callable[[torch.dtype], Iterator[Sample]]) -> Any:
        SAMPLES[name] = make
        return make

    return register


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal noise that depends on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@sample("adaptive_layer_norm")
def _adaptive_layer_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, width in [(2, 5, 12), (0, 5, 12), (1, 1, 7)]:
        arguments = {
            "x": noise(batch, length, width, dtype=dtype),
            "scale": noise(batch, width, dtype=dtype, seed=1),
            "shift": noise(batch, width, dtype=dtype, seed=2),
        }
        yield ops.adaptive_layer_norm, arguments, ("x", "scale", "shift")


@sample("gated_residual")
def _gated_residual(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, width in [(2, 5, 12), (0, 5, 12)]:
        arguments = {
            "x": noise(batch, length, width, dtype=dtype),
            "y": noise(batch, length, width, dtype=dtype, seed=1),
            "gate": noise(batch, width, dtype=dtype, seed=2),
        }
        yield ops.gated_residual, arguments, ("x", "y", "gate")
