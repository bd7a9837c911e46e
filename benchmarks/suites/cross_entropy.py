"""The supervised loss from hidden states and the head, with label smoothing. Peak memory matters as much as time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.suites.token_log_probs import attribute, costs, head
from fastvar.ops import cross_entropy

OP = "cross_entropy"
SMOOTHING = 0.1


def logits_in_memory(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, tokens.flatten(), label_smoothing=SMOOTHING)


def torch_chunked() -> Contender:
    """PyTorch's linear_cross_entropy, some rows at a time."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return f"PyTorch {torch.__version__} has no linear_cross_entropy in chunks"
    options = nn.LinearCrossEntropyOptions()

    def call(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, 1)
        return F.linear_cross_entropy(rows, weight, tokens.flatten(), label_smoothing=SMOOTHING, options=options)

    return call


def liger(device: torch.device) -> Contender:
    """Liger-Kernel's fused linear cross-entropy, the weight's gradient summed in float32, as ours is."""
    loss_class = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", device)
    if isinstance(loss_class, str):
        return loss_class
    loss = loss_class(label_smoothing=SMOOTHING, accum_dtype=torch.float32)
    return lambda hidden, weight, tokens: loss(weight, hidden.flatten(0, 1), tokens.flatten())


def build(setting: Setting, device: torch.device) -> Problem:
    hidden, weight, tokens = head(setting, device)

    def ours(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, backend: str) -> Any:
        return cross_entropy(hidden, weight, None, tokens, label_smoothing=SMOOTHING, backend=backend).loss

    contenders, backend = own(OP, hidden, ours)
    contenders |= {
        "logits in memory": logits_in_memory,
        "torch.compile": compiled(logits_in_memory, setting),
        "torch linear_cross_entropy": torch_chunked(),
        "Liger fused linear cross-entropy": liger(device),
    }
    return Problem(
        {"hidden": hidden, "weight": weight, "tokens": tokens},
        contenders,
        backend=backend,
        gradients=("hidden", "weight"),
        reference=logits_in_memory,
        **costs(hidden, weight),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "batch": 2, "dtype": "float32"}],
        "cpu": [{"model": "VAR-d16", "batch": 2, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d30", "batch": 64, "dtype": "bfloat16"},
            {"model": "VAR-d16", "batch": 64, "vocabulary": 16384, "dtype": "bfloat16"},
        ],
    },
    (
        *own_names(OP),
        "logits in memory",
        "torch.compile",
        "torch linear_cross_entropy",
        "Liger fused linear cross-entropy",
    ),
    build,
    training=True,
)
