"""LayerNorm with a modulation per sample, against eager PyTorch (what VAR does) and torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import adaptive_layer_norm

OP = "adaptive_layer_norm"


def eager(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As in FoundationVision/VAR's block."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch = MODELS[setting["model"]], setting["batch"]
    width = shape.width
    x = torch.randn(batch, shape.tokens, width, device=device).to(dtype)
    scale, shift = (torch.randn(batch, width, device=device).to(dtype) * 0.1 for _ in range(2))
    contenders, backend = own(OP, x, adaptive_layer_norm)
    contenders |= {"eager": eager, "torch.compile": compiled(eager, setting)}
    one_pass = x.numel() * x.element_size()
    return Problem(
        {"x": x, "scale": scale, "shift": shift},
        contenders,
        backend=backend,
        gradients=("x", "scale", "shift"),
        reference=eager,
        bytes=2 * one_pass,
        training_bytes=5 * one_pass,  # x and y; x, the gradient of y and that of x
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
    (*own_names(OP), "eager", "torch.compile"),
    build,
    training=True,
)
