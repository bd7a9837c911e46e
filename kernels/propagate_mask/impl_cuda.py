"""Masks to every scale in one CUDA launch, through integral images: csrc/propagate_mask.cu."""

from __future__ import annotations

import torch

from fastvar.schedule import ScaleSchedule

SHARED = 48 * 1024  # bytes of shared memory that every GPU gives a block without being asked


def forward(mask: torch.Tensor, schedule: ScaleSchedule, footprint: str, soft: bool) -> torch.Tensor:
    """See the reference. Sums are exact, or in float64 with `soft`. Up to 64 scales."""
    if mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float()  # exact
    batch, size = mask.shape[0], scratch_bytes(schedule, soft)
    out = mask.new_empty(batch, schedule.num_tokens, dtype=torch.float32 if soft else torch.bool)
    scratch = mask.new_empty((batch, size) if size > SHARED else 0, dtype=torch.uint8)
    torch.ops.fastvar_cuda.propagate_mask.default(
        mask.contiguous(), schedule.flat, footprint == "support", scratch, size, out
    )
    return out


def scratch_bytes(schedule: ScaleSchedule, soft: bool) -> int:
    """Of an image: its integral image and two ends of an interval for each row and column of each scale."""
    height, width = schedule.finest
    size = (height + 1) * (width + 1) * (8 if soft else 4) + 8 * sum(schedule.flat)
    return -(-size // 8) * 8
