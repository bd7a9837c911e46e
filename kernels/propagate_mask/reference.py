"""Masks from the finest grid to every scale in plain PyTorch: the specification."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from fastvar.schedule import ScaleSchedule


def forward(mask: torch.Tensor, schedule: ScaleSchedule, footprint: str, soft: bool) -> torch.Tensor:
    """(B, L) from a mask (B, H, W): bool, or with `soft` the mean over each token's footprint in float32."""
    height, width = schedule.finest
    values = (mask if soft else mask > 0).to(torch.float32)
    scales = []
    for h, w in schedule:
        rows = _footprints(h, height, footprint, mask.device)  # [h, H]
        columns = _footprints(w, width, footprint, mask.device)  # [w, W]
        total = rows @ values @ columns.T  # [B, h, w]
        scales.append((total / (rows.sum(1)[:, None] * columns.sum(1))).flatten(1) if soft else total.flatten(1) > 0)
    return torch.cat(scales, 1)


@lru_cache(maxsize=1024)
def _footprints(coarse: int, fine: int, footprint: str, device: torch.device) -> torch.Tensor:
    """(coarse, fine) float32, 1 where the fine cell belongs to the coarse token along one axis."""
    matrix = torch.zeros(coarse, fine, device="cpu")
    if footprint == "area" or coarse == fine:
        for i in range(coarse):
            matrix[i, i * fine // coarse : -(-(i + 1) * fine // coarse)] = 1
    else:
        for y in range(fine):
            # bicubic upsampling reads four tokens; the second one is floor((y + 1/2) coarse / fine - 1/2)
            second = ((2 * y + 1) * coarse - fine) // (2 * fine)
            matrix[max(second - 1, 0) : second + 3, y] = 1
    if footprint == "support":  # phi's convolution reaches one fine cell further on each side
        matrix = F.max_pool1d(matrix, 3, stride=1, padding=1)
    return matrix.to(device)
