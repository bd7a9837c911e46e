"""Multi-scale residual quantisation and its single step in Triton: the search, the means of bins, and upsampling. The
convolutions are PyTorch's.

The search is a product of matrices whose results stay in registers, with a running minimum. Its programs take some rows
and a part of the codes, as there are few rows at coarse scales; the parts are merged in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import card, cdiv, power_of_2
from fastvar.kernels.residual_quantize.gradients import accumulate_scale_backward
from fastvar.kernels.residual_quantize.tiles import MEANS, SEARCH, UPSAMPLED

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall, ScaleConv

__all__ = ["accumulate_scale", "accumulate_scale_backward", "forward"]

PROGRAMS = 256  # that a search should have, to fill a GPU
MOST_CHANNELS = 128  # of a program that resamples, at a time


@kernel
def residual_quantize_fwd_search_kernel(
    rows_ptr, codes_ptr, norms_ptr, distances_ptr, nearest_ptr, N, V, size,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = channel[None, :] < C
    x = tl.load(rows_ptr + row[:, None] * C + channel[None, :], (row[:, None] < N) & inside, 0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    for start in range(part * size, min((part + 1) * size, V), CODES):
        code = start + tl.arange(0, CODES)
        exists = code < V
        c = tl.load(codes_ptr + code[:, None].to(tl.int64) * C + channel[None, :], exists[:, None] & inside, 0.0)
        norm = tl.load(norms_ptr + code, exists, float("inf"))
        distance = norm[None, :] - 2 * tl.dot(x, tl.trans(c), input_precision="ieee")  # [ROWS, CODES]
        distance = tl.where(distance == distance, distance, float("inf"))  # what is not a number is never taken
        low = tl.min(distance, 1)
        first = tl.min(tl.where(distance == low[:, None], code[None, :], V), 1)
        closer = low < best
        best = tl.where(closer, low, best)
        nearest = tl.where(closer, first, nearest)
    place = part.to(tl.int64) * N + row
    tl.store(distances_ptr + place, best, row < N)
    tl.store(nearest_ptr + place, nearest, row < N)


@kernel
def residual_quantize_fwd_means_kernel(
    image_ptr, rows_ptr, height, width, H, W, C: tl.constexpr, CHANNELS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One bin of an image (C, H, W): rows (B, h w, C)."""
    program = tl.program_id(0).to(tl.int64)
    image, place = program // (height * width), (program % (height * width)).to(tl.int32)
    top, left = place // width * H // height, place % width * W // width
    bottom = ((place // width + 1) * H + height - 1) // height
    across = ((place % width + 1) * W + width - 1) // width - left
    count = (bottom - top) * across
    for start in tl.static_range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        plane_ptr = image_ptr + (image * C + channel[:, None]) * (H * W)
        total = tl.zeros((CHANNELS,), tl.float32)
        for first in range(0, count, CELLS):
            cell = first + tl.arange(0, CELLS)
            offset = (top + cell // across) * W + left + cell % across
            values = tl.load(plane_ptr + offset[None, :], (channel[:, None] < C) & (cell[None, :] < count), 0.0)
            total += tl.sum(values, 1)
        tl.store(rows_ptr + program * C + channel, tl.div_rn(total, count.to(tl.float32)), channel < C)


@triton.jit
def _cubic_weight(tap: tl.constexpr, t):
    """Of the cell `tap` - 1 from the one at or before a place, t past that one: Keys' kernel with a = -0.75."""
    x = tl.abs(t + 1 - tap)
    if tap == 1 or tap == 2:
        return (1.25 * x - 2.25) * x * x + 1
    else:
        return ((-0.75 * x + 3.75) * x - 6) * x + 3


@kernel
def residual_quantize_fwd_upsample_kernel(
    tokens_ptr, codes_ptr, image_ptr, V, height, width, H, W, down, across, tiles,
    C: tl.constexpr, CHANNELS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Some cells of an image (C, H, W), interpolated from the codes of tokens (B, h w); `down` is h / H, `across`
    w / W. A token that does not exist stands for the first or the last code."""
    image = tl.program_id(0).to(tl.int64) // tiles
    cell = tl.program_id(0) % tiles * CELLS + tl.arange(0, CELLS)
    inside = cell < H * W
    y, x = down * ((cell // W).to(tl.float32) + 0.5) - 0.5, across * ((cell % W).to(tl.float32) + 0.5) - 0.5
    row, column = tl.floor(y), tl.floor(x)
    for start in tl.static_range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        value = tl.zeros((CELLS, CHANNELS), tl.float32)
        for a in tl.static_range(4):
            weight = _cubic_weight(a, y - row)
            place = tl.minimum(tl.maximum(row.to(tl.int32) + (a - 1), 0), height - 1) * width
            part = tl.zeros((CELLS, CHANNELS), tl.float32)
            for b in tl.static_range(4):
                share = _cubic_weight(b, x - column)
                # what does not count is not read: it may be nothing that can be added
                counts = inside & (weight != 0) & (share != 0)
                near = tl.minimum(tl.maximum(column.to(tl.int32) + (b - 1), 0), width - 1)
                token = tl.load(tokens_ptr + image * height * width + place + near, counts, 0)
                token = tl.minimum(tl.maximum(token, 0), V - 1)
                used = counts[:, None] & (channel[None, :] < C)
                part += share[:, None] * tl.load(codes_ptr + token[:, None] * C + channel[None, :], used, 0.0)
            value += weight[:, None] * part
        pointers = image_ptr + (image * C + channel[None, :]) * (H * W) + cell[:, None]
        tl.store(pointers, value, inside[:, None] & (channel[None, :] < C))


def forward(call: QuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. A distance that is not a number is never the smallest; without any number the token is 0."""
    residual = call.features.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    codebook = call.codebook.to(torch.float32).contiguous()
    directions = F.normalize(codebook, dim=1) if call.znorm else codebook
    norms = torch.zeros_like(codebook[:, 0]) if call.znorm else codebook.square().sum(1)
    feature_map = torch.zeros_like(residual)
    tokens, inputs = [], [residual.new_empty(residual.shape[0], 0, residual.shape[1])]
    for k, grid in enumerate(call.schedule):
        if k:
            inputs.append(_means(feature_map, grid))
        rows = _means(residual, grid)  # [B, n_k, C]
        tokens.append(_search(F.normalize(rows, dim=2) if call.znorm else rows, directions, norms))
        phi = None if call.phi is None else call.phi.of(k)
        codes = _upsampled(tokens[k], codebook, grid, call.schedule.finest, phi)
        feature_map += codes
        residual -= codes
    all_tokens = torch.cat(tokens, 1)
    flat = all_tokens.flatten()
    # unlike bincount this waits for nothing
    usage = flat.new_zeros(len(codebook)).scatter_add_(0, flat, torch.ones_like(flat))
    return all_tokens, feature_map, torch.cat(inputs, 1), usage


def accumulate_scale(call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. A token that does not exist stands for the first or the last code: nothing waits for an error
    here."""
    feature_map, codes = call.feature_map, call.codebook.to(torch.float32).contiguous()
    tokens = call.tokens.to(torch.int64).contiguous()
    added = _upsampled(tokens, codes, (call.height, call.width), feature_map.shape[-2:], call.phi)
    accumulated = added.add_(feature_map)
    if call.next_height * call.next_width == 0:
        return accumulated, accumulated.new_empty(accumulated.shape[0], 0, accumulated.shape[1])
    return accumulated, _means(accumulated, (call.next_height, call.next_width))


def _means(image: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The means of images (B, C, H, W) over the bins of a grid: (B, h w, C). Its bins are the reference's."""
    (batch, channels, height, width), (h, w) = image.shape, grid
    rows = image.new_empty(batch, h * w, channels)
    if rows.numel():
        most = 1 if (h, w) == (height, width) else (-(-height // h) + 1) * (-(-width // w) + 1)
        residual_quantize_fwd_means_kernel[(batch * h * w,)](
            image, rows, h, w, height, width,
            C=channels, CHANNELS=_power(channels), **MEANS.choose(card(image.device), cells=most),
        )  # fmt: skip
    return rows


def _upsampled(
    tokens: torch.Tensor, codebook: torch.Tensor, grid: Sequence[int], size: Sequence[int], phi: ScaleConv | None
) -> torch.Tensor:
    """What the tokens (B, n) of a grid add to the feature map of `size`: phi(bicubic(codes)), (B, C, H, W)."""
    (batch, _), (vocabulary, channels), (height, width) = tokens.shape, codebook.shape, size
    codes = codebook.new_empty(batch, channels, height, width)
    if not codes.numel():
        return codes
    tile = UPSAMPLED.choose(card(tokens.device))
    tiles = cdiv(height * width, tile["CELLS"])
    residual_quantize_fwd_upsample_kernel[(batch * tiles,)](
        tokens, codebook, codes, vocabulary, *grid, height, width, grid[0] / height, grid[1] / width, tiles,
        C=channels, CHANNELS=_power(channels), **tile,
    )  # fmt: skip
    if phi is None:
        return codes
    # follows torch.backends.cudnn, as in the reference
    blurred = F.conv2d(codes, phi.weight.to(torch.float32), phi.bias.to(torch.float32), padding=1)
    return codes.mul_(1 - phi.ratio).add_(blurred, alpha=phi.ratio)


def _power(channels: int) -> int:
    return min(MOST_CHANNELS, power_of_2(channels))


def _search(rows: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The nearest of the codes (V, C) to each of the rows (B, n, C)."""
    batch, length, channels = rows.shape
    count, size = batch * length, len(codes)
    if not rows.numel():
        return torch.zeros(batch, length, dtype=torch.int64, device=rows.device)
    width = max(16, power_of_2(channels))
    tile = SEARCH.choose(card(rows.device), length=length)
    tiles, blocks = cdiv(count, tile["ROWS"]), cdiv(size, tile["CODES"])
    each = cdiv(blocks, min(blocks, cdiv(PROGRAMS, tiles)))
    parts = cdiv(blocks, each)
    distances = torch.empty(parts, count, dtype=torch.float32, device=rows.device)
    nearest = torch.empty(parts, count, dtype=torch.int32, device=rows.device)
    residual_quantize_fwd_search_kernel[(tiles, parts)](
        rows, codes, norms, distances, nearest, count, size, each * tile["CODES"], C=channels, WIDTH=width, **tile
    )
    if parts > 1:
        nearest = torch.where(distances == distances.amin(0), nearest, size).amin(0)
    return nearest.view(batch, length).to(torch.int64)
