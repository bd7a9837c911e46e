"""Masks to every scale in C++, through integral images: csrc/propagate_mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastvar.ops.propagate_mask import PropagateMaskCall


def forward(call: PropagateMaskCall) -> torch.Tensor:
    """See the reference. Sums are exact, or in float64 with `soft`."""
    mask, schedule = call.mask, call.schedule
    if mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float()  # exact
    out = torch.empty(mask.shape[0], schedule.num_tokens, dtype=torch.float32 if call.soft else torch.bool)
    torch.ops.fastvar_cpu.propagate_mask.default(mask.contiguous(), schedule.flat, call.footprint == "support", 1, out)
    return out
