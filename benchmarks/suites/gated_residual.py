"""The gated residual of an AdaLN block, against eager PyTorch (what VAR does), torch.addcmul and torch.compile."""

from __future__ import annotations

import torch

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import gated_residual

OP = "gated_residual"


def eager(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As in FoundationVision/VAR's block: a product, then a sum."""
    return x + y * gate[:, None]


def addcmul(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The same as one kernel of PyTorch's own."""
    return torch.addcmul(x, y, gate[:, None])


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch = MODELS[setting["model"]], setting["batch"]
    x, y = (torch.randn(batch, shape.tokens, shape.width, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(batch, shape.width, device=device).to(dtype)
    contenders, backend = own(OP, x, gated_residual)
    contenders |= {"eager": eager, "torch.addcmul": addcmul, "torch.compile": compiled(eager, setting)}
    one_pass = x.numel() * x.element_size()
    return Problem(
        {"x": x, "y": y, "gate": gate},
        contenders,
        backend=backend,
        gradients=("x", "y", "gate"),
        reference=eager,
        bytes=3 * one_pass,  # x, y and the sum
        training_bytes=6 * one_pass,  # then the incoming gradient, which is x's too, y for the gate's, and y's
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
    (*own_names(OP), "eager", "torch.addcmul", "torch.compile"),
    build,
    training=True,
)
