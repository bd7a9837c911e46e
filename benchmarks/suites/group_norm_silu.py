"""Group norm and SiLU of an autoencoder, channels-last, against eager PyTorch (what VAR does) and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from fastvar.ops import group_norm_silu

OP, GROUPS = "group_norm_silu", 32


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As in FoundationVision/VAR's tokenizer, of a channels-last image."""
    image = x.mT[..., None]  # [B, C, N, 1]
    return F.silu(F.group_norm(image, GROUPS, weight, bias, 1e-6))[..., 0].mT


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    channels = setting["channels"]
    x = torch.randn(setting["batch"], setting["side"] ** 2, channels, device=device).to(dtype)
    weight, bias = torch.randn(2, channels, device=device).to(dtype).unbind()
    contenders, backend = own(OP, x, partial(group_norm_silu, groups=GROUPS))
    contenders |= {"eager": eager, "torch.compile": compiled(eager, setting)}
    one_pass = x.numel() * x.element_size()
    return Problem(
        {"x": x, "weight": weight, "bias": bias},
        contenders,
        backend=backend,
        gradients=("x", "weight", "bias"),
        reference=eager,
        bytes=3 * one_pass,  # once for the statistics; then the result
        training_bytes=9 * one_pass,  # statistics again, sums of the incoming gradient, and the gradient
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"batch": 2, "side": 4, "channels": 32, "dtype": "float32"}],
        "cpu": [{"batch": 1, "side": 256, "channels": 160, "dtype": "float32"}],
        "gpu": [
            {"batch": 16, "side": 256, "channels": 160, "dtype": "bfloat16"},
            {"batch": 64, "side": 16, "channels": 640, "dtype": "bfloat16"},
            {"batch": 16, "side": 256, "channels": 160, "dtype": "float32"},
        ],
    },
    (*own_names(OP), "eager", "torch.compile"),
    build,
    training=True,
)
