"""Block-causal attention by the package flash-attn-4 on Hopper and Blackwell, by flash-attn elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

import torch
from fastvar.kernels.block_causal_attention.by_scale import ByScale

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ByScale`."""
    return _implementation(call.q.device).forward(call)


def backward(call: AttentionCall, *rest: Any) -> dict[str, torch.Tensor]:
    """See `ByScale`."""
    return _implementation(call.q.device).backward(call, *rest)


@cache
def _implementation(device: torch.device) -> ByScale:
    folder = "fastvar.kernels.block_causal_attention"
    major = torch.cuda.get_device_capability(device)[0]
    if major in (9, 10) and _installed("flash-attn-4"):
        return ByScale(import_module(f"{folder}.flash_attn_4").FlashAttention4(major))
    if not _installed("flash-attn"):
        raise ValueError(
            "block_causal_attention: backend='flash_attn': expected the package flash-attn for a GPU of compute "
            f"capability {major}, got flash-attn-4, which is used on 9 and 10"
        )
    return ByScale(import_module(f"{folder}.flash_attn_2").FlashAttention2())


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
