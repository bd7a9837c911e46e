"""Weights that FSDP2 has sharded over processes, gathered for more than a block's forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def gather_for_methods(model: nn.Module) -> None:
    """Let blocks that FSDP2 (`fully_shard`) has sharded gather their weights for the methods that a transformer calls
    on them besides forward. Other models are left alone."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for method in ("modulate", "read_text", "keys_and_values", "mix"):
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)


def name_blocks(model: Any, blocks: Iterable[nn.Module]) -> None:
    """Tell accelerate's FSDP2 plugin, under TRANSFORMER_BASED_WRAP, what to shard and gather as one: each block."""
    model._no_split_modules = sorted({type(block).__name__ for block in blocks})
