"""Masks from the finest grid to the tokens of every scale in Triton, in one launch.

A program takes some tokens and adds up the cells of their footprints. Where the footprints lie is looked up in a table
that is made once for a schedule.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import Row, Table, card, cdiv

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.propagate_mask import PropagateMaskCall

# The TOKENS of a program, and how many cells of their footprints it adds up at a time, where footprints are small (FEW)
# and where they are not (MANY).
TILE = Table("propagate_mask.propagate", [Row({"TOKENS": 8, "FEW": 16, "MANY": 128, "num_warps": 4})])


@triton.jit
def _covered(mask, mask_h, mask_w, top, left, width, area, most, CELLS: tl.constexpr, SOFT: tl.constexpr):
    """Sums over the footprints [TOKENS, 1], of the mask or of the number of cells above 0."""
    total = tl.zeros_like(area).to(tl.float32)
    for start in range(0, most, CELLS):
        cell = start + tl.arange(0, CELLS)[None, :]
        row, column = top + cell // width, left + cell % width  # [TOKENS, CELLS]
        values = tl.load(mask + row.to(tl.int64) * mask_h + column.to(tl.int64) * mask_w, cell < area, 0.0)
        total += tl.sum(values.to(tl.float32) if SOFT else tl.where(values > 0, 1.0, 0.0), 1)[:, None]
    return total


@kernel
def propagate_mask_fwd_kernel(
    mask_ptr, footprints_ptr, out_ptr, mask_b, mask_h, mask_w, L,
    TOKENS: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    # images and tiles may both be more than a second axis takes
    blocks = tl.cdiv(L, TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)[:, None]  # [TOKENS, 1]
    valid = token < L
    top = tl.load(footprints_ptr + token, valid, 0)
    left = tl.load(footprints_ptr + L + token, valid, 0)
    height = tl.load(footprints_ptr + 2 * L + token, valid, 1)
    width = tl.load(footprints_ptr + 3 * L + token, valid, 1)
    area = height * width
    most = tl.max(area)
    mask = mask_ptr + b * mask_b
    # Tokens of fine scales have few cells, those of coarse ones all.
    if most <= FEW:
        total = _covered(mask, mask_h, mask_w, top, left, width, area, most, FEW, SOFT)
    else:
        total = _covered(mask, mask_h, mask_w, top, left, width, area, most, MANY, SOFT)
    if SOFT:
        tl.store(out_ptr + b * L + token, tl.div_rn(total, area.to(tl.float32)), valid)
    else:
        tl.store(out_ptr + b * L + token, total > 0, valid)


def forward(call: PropagateMaskCall) -> torch.Tensor:
    """See the reference."""
    mask = call.mask
    batch, length = mask.shape[0], call.schedule.num_tokens
    out = torch.empty(batch, length, dtype=torch.float32 if call.soft else torch.bool, device=mask.device)
    if batch:
        values = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        tile = TILE.choose(card(mask.device))
        propagate_mask_fwd_kernel[(batch * cdiv(length, tile["TOKENS"]),)](
            values, footprints(call.schedule, call.footprint, mask.device), out, *mask.stride(), length, **tile,
            SOFT=call.soft,
        )  # fmt: skip
    return out


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def footprints(schedule: ScaleSchedule, footprint: str, device: torch.device) -> torch.Tensor:
    """(4, L) int32 on the device: the top row, the left column, the height and the width of every footprint. It is
    copied there at the first call, which waits for the device and cannot be captured."""
    columns: list[tuple[int, int, int, int]] = []
    height, width = schedule.finest
    for h, w in schedule:
        rows = [_interval(i, h, height, footprint) for i in range(h)]
        across = [_interval(j, w, width, footprint) for j in range(w)]
        columns += [(top, left, bottom - top, right - left) for top, bottom in rows for left, right in across]
    return torch.tensor(columns, dtype=torch.int32, device="cpu").T.contiguous().to(device)


def _interval(i: int, coarse: int, fine: int, footprint: str) -> tuple[int, int]:
    """The first fine cell of token i along one axis, and one past the last."""
    if footprint == "area":
        return i * fine // coarse, _up((i + 1) * fine, coarse)
    if coarse == fine:
        first, end = i, i + 1
    else:
        # Bicubic upsampling reads token i for cell y if x = (y + 1/2) coarse / fine - 1/2 is in [i - 2, i + 2).
        first, end = (_up((2 * i + 2 * side + 1) * fine - coarse, 2 * coarse) for side in (-2, 2))
    return max(first - 1, 0), min(end + 1, fine)  # one more on each side for phi


def _up(a: int, b: int) -> int:
    return -(-a // b)
