"""Multi-scale residual quantisation with the search for the nearest codes in Triton: a product of matrices whose
results stay in registers, with a running minimum. All else is the reference's.

Programs take some rows and a part of the codes, as there are few rows at coarse scales; the parts are merged in their
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastvar.kernels.residual_quantize import reference

from fastvar.schedule import ScaleSchedule

BLOCK_ROWS = 64
BLOCK_CODES = 128
PROGRAMS = 256  # that a search should have, to fill a GPU


@triton.jit
def _nearest_codes(
    rows_ptr, codes_ptr, norms_ptr, distances_ptr, found_ptr, N, V, size,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = channel[None, :] < C
    x = tl.load(rows_ptr + row[:, None].to(tl.int64) * C + channel[None, :], (row[:, None] < N) & inside, 0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    at = tl.zeros((ROWS,), tl.int32)
    for start in range(part * size, min((part + 1) * size, V), CODES):
        code = start + tl.arange(0, CODES)
        there = code < V
        c = tl.load(codes_ptr + code[:, None].to(tl.int64) * C + channel[None, :], there[:, None] & inside, 0.0)
        norm = tl.load(norms_ptr + code, there, float("inf"))
        distance = norm[None, :] - 2 * tl.dot(x, tl.trans(c), input_precision="ieee")  # [ROWS, CODES]
        distance = tl.where(distance == distance, distance, float("inf"))  # what is not a number is never taken
        low = tl.min(distance, 1)
        first = tl.min(tl.where(distance == low[:, None], code[None, :], V), 1)
        closer = low < best
        best = tl.where(closer, low, best)
        at = tl.where(closer, first, at)
    place = part.to(tl.int64) * N + row
    tl.store(distances_ptr + place, best, row < N)
    tl.store(found_ptr + place, at, row < N)


def forward(
    features: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    phi_index: Sequence[int],
    schedule: ScaleSchedule,
    znorm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0."""
    residual = features.to(torch.float32).contiguous()
    codebook = codebook.to(torch.float32).contiguous()
    directions = F.normalize(codebook, dim=1) if znorm else codebook
    norms = torch.zeros_like(codebook[:, 0]) if znorm else codebook.square().sum(1)
    feature_map = torch.zeros_like(residual)
    tokens, inputs = [], []
    for k, grid in enumerate(schedule):
        rows = reference._to_rows(reference._area(residual, grid))  # [B, n_k, C]
        tokens.append(_search(F.normalize(rows, dim=2) if znorm else rows, directions, norms))
        weight, bias = None, None
        if phi_weight is not None and phi_bias is not None:
            weight, bias = phi_weight[phi_index[k]], phi_bias[phi_index[k]]
        codes = reference._upsampled(tokens[k], codebook, grid, schedule.finest, weight, bias, phi_ratio)
        feature_map = feature_map + codes
        residual = residual - codes
        if k + 1 < len(schedule):
            inputs.append(reference._to_rows(reference._area(feature_map, schedule[k + 1])))
    empty = residual.new_zeros(residual.shape[0], 0, residual.shape[1])
    found = torch.cat(tokens, 1)
    return found, feature_map, torch.cat([empty, *inputs], 1), reference._uses(found, len(codebook))


def _search(rows: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The nearest of the codes (V, C) to each of the rows (B, n, C)."""
    batch, length, channels = rows.shape
    count, size = batch * length, len(codes)
    if not rows.numel():
        return torch.zeros(batch, length, dtype=torch.int64, device=rows.device)
    width = max(16, triton.next_power_of_2(channels))
    block_rows = min(BLOCK_ROWS, max(16, triton.next_power_of_2(count)))
    tiles, blocks = triton.cdiv(count, block_rows), triton.cdiv(size, BLOCK_CODES)
    each = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, tiles)))
    parts = triton.cdiv(blocks, each)
    distances = torch.empty(parts, count, dtype=torch.float32, device=rows.device)
    found = torch.empty(parts, count, dtype=torch.int32, device=rows.device)
    _nearest_codes[(tiles, parts)](
        rows, codes, norms, distances, found, count, size, each * BLOCK_CODES,
        C=channels, WIDTH=width, ROWS=block_rows, CODES=BLOCK_CODES, num_warps=8 if block_rows == BLOCK_ROWS else 4,
    )  # fmt: skip
    if parts > 1:
        found = torch.where(distances == distances.amin(0), found, size).amin(0)
    return found.view(batch, length).to(torch.int64)
