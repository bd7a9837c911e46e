"""The gated residual of an AdaLN block and the norm after it, against eager PyTorch (what VAR does), torch.compile and
fastvar's two operators one after the other."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.adaptive_layer_norm import eager as norm
from benchmarks.suites.gated_residual import eager as gated
from fastvar.ops import adaptive_layer_norm, gated_residual, gated_residual_norm

OP = "gated_residual_norm"
Pair = tuple[torch.Tensor, torch.Tensor]


def eager(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Pair:
    """As in FoundationVision/VAR's block."""
    x = gated(x, y, gate)
    return x, norm(x, scale, shift)


def apart(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, backend: str
) -> Pair:
    x = gated_residual(x, y, gate, backend=backend)
    return x, adaptive_layer_norm(x, scale, shift, backend=backend)


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch = MODELS[setting["model"]], setting["batch"]
    x, y = (torch.randn(batch, shape.tokens, shape.width, device=device).to(dtype) for _ in range(2))
    gate, scale, shift = (torch.randn(batch, shape.width, device=device).to(dtype) * 0.1 for _ in range(3))
    contenders, backend = own(OP, x, gated_residual_norm)
    contenders |= {
        "fastvar, apart": partial(apart, backend=backend),
        "eager": eager,
        "torch.compile": compiled(eager, setting),
    }
    one_pass = x.numel() * x.element_size()
    return Problem(
        {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift},
        contenders,
        backend=backend,
        gradients=("x", "y", "gate", "scale", "shift"),
        reference=eager,
        bytes=4 * one_pass,  # x, y, the residual and its norm
        training_bytes=10 * one_pass,  # then the residual, y, two incoming gradients, and those of x and y
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "batch": 2, "dtype": "float32"}],
        "cpu": [{"model": "VAR-d16", "batch": 2, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d16", "batch": 64, "dtype": "bfloat16"},
            {"model": "VAR-d30", "batch": 32, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "batch": 4, "dtype": "bfloat16"},
        ],
    },
    (*own_names(OP), "fastvar, apart", "eager", "torch.compile"),
    build,
    training=True,
)
