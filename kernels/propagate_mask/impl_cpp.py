"""Masks to every scale in C++, through integral images: csrc/propagate_mask."""

from __future__ import annotations

import torch

from fastvar.schedule import ScaleSchedule


def forward(mask: torch.Tensor, schedule: ScaleSchedule, footprint: str, soft: bool) -> torch.Tensor:
    """See the reference. Sums are exact, or in float64 with `soft`."""
    if mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float()  # exact
    out = torch.empty(mask.shape[0], schedule.num_tokens, dtype=torch.float32 if soft else torch.bool)
    torch.ops.fastvar_cpu.propagate_mask.default(mask.contiguous(), schedule.flat, footprint == "support", 1, out)
    return out
