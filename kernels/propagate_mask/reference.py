"""Masks from the finest grid to every scale in plain PyTorch: the specification."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.propagate_mask import PropagateMaskCall


def forward(call: PropagateMaskCall) -> torch.Tensor:
    """(B, L): whether a token's footprint has a cell of the mask, or with `soft` the mean over it in float32."""
    height, width = call.schedule.finest
    values = (call.mask if call.soft else call.mask > 0).to(torch.float32)
    scales = []
    for h, w in call.schedule:
        rows = _footprints(h, height, call.footprint, values.device)  # [h, H]
        columns = _footprints(w, width, call.footprint, values.device)  # [w, W]
        total = rows @ values @ columns.T  # [B, h, w]
        mean = total / (rows.sum(1)[:, None] * columns.sum(1))
        scales.append((mean if call.soft else total > 0).flatten(1))
    return torch.cat(scales, 1)


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
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
