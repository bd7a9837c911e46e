"""Group norm and SiLU in Triton, forward and backward, over rows of adjacent channels.

Three launches: moments of each channel over a part of the rows, statistics of each group from all parts' moments, and
the result. Squares are those of distances to the means so far (Welford 1962), and moments are merged as Chan, Golub and
LeVeque (1983) do, so that neither a large mean nor an outlier costs digits. The backward pass computes the statistics
anew and has the same three steps, with sums. All is added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiling import Row, Table, card, cdiv, power_of_2

if TYPE_CHECKING:
    from fastvar.ops.group_norm_silu import GroupNormCall

PROGRAMS = 264  # that sum over a sample's rows at most, two for each multiprocessor of an H200: a lone image is enough
LONG = 4  # tiles of rows of a part at least, if there are so many: adding up what lanes found costs as much as two
COLUMNS = 128  # the most channels that a program takes
TILE = Table(  # elements that a program holds at a time, and the most registers of a thread of the first pass
    "group_norm_silu",
    # with more registers a multiprocessor holds three blocks instead of four, as of 32 bits, where 128 do not suffice
    [
        Row({"TILE": 4096, "num_warps": 4, "maxnreg": 128}, most={"bits": 16}),
        Row({"TILE": 4096, "num_warps": 4, "maxnreg": 255}),
    ],
    candidates={"TILE": (2048, 4096, 8192), "num_warps": (4, 8), "maxnreg": (128, 255)},
)


@triton.jit
def _place(parts, C: tl.constexpr, COLS: tl.constexpr):
    """This program's sample, part of the rows, and columns [1, COLS]."""
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    pid = tl.program_id(0)
    column = (pid % BLOCKS) * COLS + tl.arange(0, COLS)[None, :]
    return (pid // BLOCKS // parts).to(tl.int64), pid // BLOCKS % parts, column


@triton.jit
def _read(ptr, b, row, column, b_stride, n_stride, c_stride, seen):
    place = ptr + b * b_stride + row.to(tl.int64) * n_stride + column.to(tl.int64) * c_stride
    return tl.load(place, seen, 0.0)


@triton.jit
def _load(ptr, b, row, column, b_stride, n_stride, c_stride, seen):
    return _read(ptr, b, row, column, b_stride, n_stride, c_stride, seen).to(tl.float32)


@triton.jit
def _added(ptr, b, channel, valid, parts, C: tl.constexpr, G2: tl.constexpr, STEP: tl.constexpr):
    """Both sums of a group's channels [G2] over all parts."""
    first = tl.zeros((STEP, G2), tl.float32)
    second = tl.zeros((STEP, G2), tl.float32)
    for start in range(0, parts, STEP):
        part = start + tl.arange(0, STEP)[:, None]
        place = ptr + (b * parts + part) * 2 * C + channel[None, :]
        first += tl.load(place, (part < parts) & valid[None, :], 0.0)
        second += tl.load(place + C, (part < parts) & valid[None, :], 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@kernel
def group_norm_silu_fwd_moments_kernel(
    x_ptr, moments_ptr, x_b, x_n, x_c, N, size, parts,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each channel's mean, and the squared distances to it, over a part."""
    b, part, column = _place(parts, C, COLS)
    begin, end = part * size, tl.minimum((part + 1) * size, N)
    lane = tl.arange(0, ROWS)[:, None]
    mean = tl.zeros((ROWS, COLS), tl.float32)  # of the rows that a lane has seen
    squares = tl.zeros((ROWS, COLS), tl.float32)
    before = 0.0  # rows that a lane has seen
    x = _read(x_ptr, b, begin + lane, column, x_b, x_n, x_c, (begin + lane < end) & (column < C))  # [ROWS, COLS]
    for start in range(begin, end, ROWS):
        row = start + ROWS + lane  # the next ones are on their way while these are added
        following = _read(x_ptr, b, row, column, x_b, x_n, x_c, (row < end) & (column < C))
        distance = x.to(tl.float32) - mean
        share = tl.where(start + lane < end, 1 / (before + 1), 0.0)  # [ROWS, 1]
        mean += distance * share
        squares += distance * (distance * (before * share))
        before += 1
        x = following
    count = (tl.maximum(end - begin - lane + ROWS - 1, 0) // ROWS).to(tl.float32)  # [ROWS, 1]
    rows = (end - begin).to(tl.float32)
    middle = (tl.sum(count * mean, 0) / rows)[None, :]
    middle += (tl.sum(count * (mean - middle), 0) / rows)[None, :]  # what a sum of large means has lost
    squares += count * (mean - middle) * (mean - middle)
    place = moments_ptr + (b * parts + part) * 2 * C + column
    tl.store(place, middle, column < C)
    tl.store(place + C, tl.sum(squares, 0)[None, :], column < C)


@triton.jit
def _part_of(ptr, b, start, channel, valid, base, N, size, parts, C: tl.constexpr, STEP: tl.constexpr):
    """Some parts' numbers of rows [STEP, 1], and where they have any, where their moments are, and how far their means
    are from `base` [STEP, G2]."""
    part = start + tl.arange(0, STEP)[:, None]
    seen = (part < parts) & valid[None, :]
    place = ptr + (b * parts + part) * 2 * C + channel[None, :]
    count = tl.where(part < parts, tl.minimum(N - part * size, size), 0).to(tl.float32)
    return count, seen, place, tl.where(seen, tl.load(place, seen, 0.0) - base[None, :], 0.0)


@kernel
def group_norm_silu_fwd_statistics_kernel(
    moments_ptr, shift_ptr, statistics_ptr, N, size, parts, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, G2: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = C // GROUPS
    b, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    valid = tl.arange(0, G2) < G
    channel = group * G + tl.arange(0, G2)
    base = tl.load(moments_ptr + b * parts * 2 * C + channel, valid, 0.0)  # the first part's means [G2]
    total = tl.zeros((STEP, G2), tl.float32)
    for start in range(0, parts, STEP):
        count, _, _, apart = _part_of(moments_ptr, b, start, channel, valid, base, N, size, parts, C, STEP)
        total += count * apart
    offset = tl.sum(total, 0) / N
    squares = tl.zeros((STEP, G2), tl.float32)
    for start in range(0, parts, STEP):
        count, seen, place, apart = _part_of(moments_ptr, b, start, channel, valid, base, N, size, parts, C, STEP)
        squares += tl.load(place + C, seen, 0.0) + count * (apart - offset[None, :]) * (apart - offset[None, :])
    shift = tl.zeros((G2,), tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + channel, valid, 0.0).to(tl.float32)
    means = tl.where(valid, base + shift + offset, 0.0)
    mean = tl.sum(means, 0) / G
    mean += tl.sum(tl.where(valid, means - mean, 0.0), 0) / G  # what a sum of large means has lost
    spread = tl.where(valid, means - mean, 0.0)
    variance = (tl.sum(tl.sum(squares, 0), 0) + tl.sum(spread * spread, 0) * N) / G / N
    rstd = 1 / tl.sqrt(variance + eps)
    place = statistics_ptr + b * 3 * C + channel
    tl.store(place, mean - shift, valid)
    tl.store(place + C, tl.zeros((G2,), tl.float32) + rstd, valid)
    tl.store(place + 2 * C, spread * rstd, valid)


@triton.jit
def _normalised(x, statistics_ptr, weight_ptr, bias_ptr, b, column, C: tl.constexpr):
    """The normalised rows, the gain 1 / deviation and the weight [1, COLS], and the result before SiLU."""
    mean = tl.load(statistics_ptr + b * 3 * C + column, column < C, 0.0)
    rstd = tl.load(statistics_ptr + b * 3 * C + C + column, column < C, 0.0)
    weight = tl.load(weight_ptr + column, column < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < C, 0.0).to(tl.float32)
    normed = (x - mean) * rstd
    return normed, rstd, weight, normed * weight + bias


@kernel
def group_norm_silu_fwd_kernel(
    x_ptr, statistics_ptr, weight_ptr, bias_ptr, out_ptr, x_b, x_n, x_c, N, tiles,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    b, tile, column = _place(tiles, C, COLS)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    seen = (row < N) & (column < C)
    x = _load(x_ptr, b, row, column, x_b, x_n, x_c, seen)
    _, _, _, y = _normalised(x, statistics_ptr, weight_ptr, bias_ptr, b, column, C)
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(out_ptr + (b * N + row) * C + column, y, seen)


@triton.jit
def _slope(g, y, SILU: tl.constexpr):
    """The gradient before SiLU."""
    if SILU:
        gate = 1 / (1 + tl.exp(-y))
        g = g * gate * (1 + y * (1 - gate))
    return g


@kernel
def group_norm_silu_bwd_sums_kernel(
    g_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, sums_ptr,
    g_b, g_n, g_c, x_b, x_n, x_c, N, size, parts,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    b, part, column = _place(parts, C, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    along = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(part * size, tl.minimum((part + 1) * size, N), ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        seen = (row < N) & (column < C)
        x = _load(x_ptr, b, row, column, x_b, x_n, x_c, seen)
        normed, _, _, y = _normalised(x, statistics_ptr, weight_ptr, bias_ptr, b, column, C)
        g = _slope(_load(g_ptr, b, row, column, g_b, g_n, g_c, seen), y, SILU)
        total += g
        along += tl.where(seen, g * normed, 0.0)
    place = sums_ptr + (b * parts + part) * 2 * C + column
    tl.store(place, tl.sum(total, 0)[None, :], column < C)
    tl.store(place + C, tl.sum(along, 0)[None, :], column < C)


@kernel
def group_norm_silu_bwd_statistics_kernel(
    sums_ptr, statistics_ptr, weight_ptr, channels_ptr, groups_ptr, N, parts,
    C: tl.constexpr, GROUPS: tl.constexpr, G2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = C // GROUPS
    b, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    valid = tl.arange(0, G2) < G
    channel = group * G + tl.arange(0, G2)
    total, along = _added(sums_ptr, b, channel, valid, parts, C, G2, STEP)
    weight = tl.load(weight_ptr + channel, valid, 0.0).to(tl.float32)
    group_total, group_along = tl.sum(weight * total, 0) / G / N, tl.sum(weight * along, 0) / G / N
    rstd = tl.load(statistics_ptr + b * 3 * C + C + channel, valid, 0.0)
    normed = tl.load(statistics_ptr + b * 3 * C + 2 * C + channel, valid, 0.0)
    place = channels_ptr + b * 3 * C + channel
    tl.store(place, total, valid)
    tl.store(place + C, along, valid)
    # the sum of dx, of which each is rounded
    tl.store(place + 2 * C, rstd * (weight * total - (group_total + normed * group_along) * N), valid)
    place = groups_ptr + b * 2 * C + channel
    tl.store(place, tl.zeros((G2,), tl.float32) + group_total, valid)
    tl.store(place + C, tl.zeros((G2,), tl.float32) + group_along, valid)


@kernel
def group_norm_silu_bwd_kernel(
    g_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, groups_ptr, dx_ptr,
    g_b, g_n, g_c, x_b, x_n, x_c, N, tiles,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    b, tile, column = _place(tiles, C, COLS)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    seen = (row < N) & (column < C)
    x = _load(x_ptr, b, row, column, x_b, x_n, x_c, seen)
    normed, rstd, weight, y = _normalised(x, statistics_ptr, weight_ptr, bias_ptr, b, column, C)
    g = _slope(_load(g_ptr, b, row, column, g_b, g_n, g_c, seen), y, SILU)
    total = tl.load(groups_ptr + b * 2 * C + column, column < C, 0.0)
    along = tl.load(groups_ptr + b * 2 * C + C + column, column < C, 0.0)
    tl.store(dx_ptr + (b * N + row) * C + column, rstd * (weight * g - total - normed * along), seen)


def forward(call: GroupNormCall) -> torch.Tensor:
    """See the reference."""
    x = call.x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch = _Launch(x, call.groups)
        statistics = launch.statistics(x, call.shift, call.eps)
        group_norm_silu_fwd_kernel[(launch.blocks * launch.tiles,)](
            x, statistics, call.weight.contiguous(), call.bias.contiguous(), out, *x.stride(), x.shape[1],
            launch.tiles, SILU=call.silu, **launch.tile,
        )  # fmt: skip
    return out


def backward(
    call: GroupNormCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of x, weight, bias and shift, as far as they are needed."""
    (g,), x, (batch, length, channels) = grads, call.x, call.x.shape
    if not x.numel():
        return {}
    assert g is not None
    launch = _Launch(x, call.groups)
    statistics = launch.statistics(x, call.shift, call.eps)
    affine = (call.weight.contiguous(), call.bias.contiguous())
    sums = launch.sums_of(x)
    group_norm_silu_bwd_sums_kernel[(launch.blocks * launch.parts,)](
        g, x, statistics, *affine, sums, *g.stride(), *x.stride(), length, launch.size, launch.parts,
        SILU=call.silu, **launch.tile,
    )  # fmt: skip
    by_channel = torch.empty(batch, 3, channels, dtype=torch.float32, device=x.device)
    by_group = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    group_norm_silu_bwd_statistics_kernel[(batch * call.groups,)](
        sums, statistics, affine[0], by_channel, by_group, length, launch.parts, **launch.group
    )
    gradients = {}
    if needs.x:
        gradients["x"] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        group_norm_silu_bwd_kernel[(launch.blocks * launch.tiles,)](
            g, x, statistics, *affine, by_group, gradients["x"], *g.stride(), *x.stride(), length, launch.tiles,
            SILU=call.silu, **launch.tile,
        )  # fmt: skip
    if needs.weight or needs.bias or needs.shift:
        dbias, dweight, dshift = by_channel.sum(0)
        gradients |= {"weight": dweight.to(call.weight.dtype), "bias": dbias.to(call.bias.dtype)}
        if call.shift is not None:
            gradients["shift"] = dshift.to(call.shift.dtype)
    return gradients


class _Launch:
    """How the rows of a call are divided; it does not depend on the batch."""

    def __init__(self, x: torch.Tensor, groups: int) -> None:
        batch, length, channels = x.shape
        options = TILE.choose(card(x.device), bits=8 * x.element_size())
        tile, self.registers = options.pop("TILE"), options.pop("maxnreg")
        exact = channels & -channels  # the largest power of two that divides them: no lane is idle
        columns = min(exact if exact >= 32 else power_of_2(channels), COLUMNS)
        rows = max(tile // columns, 1)
        blocks, self.tiles = cdiv(channels, columns), cdiv(length, rows)
        self.size = rows * max(cdiv(self.tiles * blocks, PROGRAMS), min(self.tiles, LONG))
        self.parts, self.blocks = cdiv(length, self.size), batch * blocks
        self.tile: dict[str, Any] = {"C": channels, "ROWS": rows, "COLS": columns, **options}
        wide = power_of_2(channels // groups)
        self.group: dict[str, Any] = {"C": channels, "GROUPS": groups, "G2": wide, "num_warps": 1}
        self.group["STEP"] = max(min(power_of_2(self.parts), 1024 // wide), 1)

    def sums_of(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape[0], self.parts, 2, x.shape[2], dtype=torch.float32, device=x.device)

    def statistics(self, x: torch.Tensor, shift: torch.Tensor | None, eps: float) -> torch.Tensor:
        """(B, 3, C): what is subtracted from each channel, 1 / deviation, and the mean of the normalised channel."""
        moments, length = self.sums_of(x), x.shape[1]
        group_norm_silu_fwd_moments_kernel[(self.blocks * self.parts,)](
            x, moments, *x.stride(), length, self.size, self.parts, **self.tile, maxnreg=self.registers
        )
        statistics = torch.empty(x.shape[0], 3, x.shape[2], dtype=torch.float32, device=x.device)
        shifts = statistics if shift is None else shift.contiguous()
        group_norm_silu_fwd_statistics_kernel[(x.shape[0] * self.group["GROUPS"],)](
            moments, shifts, statistics, length, self.size, self.parts, eps, SHIFT=shift is not None, **self.group
        )
        return statistics
