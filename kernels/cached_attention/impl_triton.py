"""Attention of new queries to prefix, trunk and a sample's own keys in Triton.

Each of the three parts is a matrix of keys that some samples share: their queries are rows of one tile, so that what is
shared is read once for all of them. Where queries are few, the keys of a part are divided among several programs. What
comes of a part is merged by log-sum-exp, always in the same order. How keys are divided and how high a tile is depends
on the number of keys and of queries of one sample alone, hence no result depends on the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton.language as tl
from fastvar.kernels.cached_attention.tiles import PART
from fastvar.kernels.common.launching import kernel
from fastvar.kernels.common.tiles import LOG2_E, attend, common_factor, constants, head, rows_adjacent
from fastvar.kernels.common.tiling import card, cdiv, power_of_2

if TYPE_CHECKING:
    from fastvar.ops.cached_attention import CachedAttentionCall

FEW = 64  # queries of a sample; from there on, tiles of queries alone keep a GPU busy
SPLIT = 512  # keys of a program where queries are few
MERGED = 8  # rows that a program of the merge takes


@kernel
def cached_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, rows, n, SHARE, KEYS, H, split, divisions, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of SHARE samples to `split` keys that they share; results of row (b, h, i) of this division
    go to place ((division * B + b) * n + i) * H + h. All programs lie along one axis, as the others hold 65,535."""
    tiles = tl.cdiv(SHARE * n, BLOCK_M)
    place = tl.program_id(0) // tiles
    division, line = place % divisions, place // divisions
    s, h = (line // H).to(tl.int64), (line % H).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # of SHARE samples, n tokens each
    b, token = s * SHARE + row // n, row % n
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = row < SHARE * n
    start = b * q_b + token.to(tl.int64) * q_l + h * q_h
    q = tl.load(q_ptr + start[:, None] + d, inside[:, None] & (d < D), 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    seen = KEYS
    if lengths_ptr is not None:
        seen = tl.minimum(tl.maximum(tl.load(lengths_ptr + s), 0), KEYS).to(tl.int32)
    begin = tl.minimum(division * split, seen)
    end = tl.minimum(begin + split, seen)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    k_ptr = head(k_ptr, s, h, k_b, k_h, ALIGNED)
    v_ptr = head(v_ptr, s, h, v_b, v_h, ALIGNED)
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, begin, whole, 0, whole, factor,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, k_l, v_l, whole, end, 0, end, factor,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    empty = total == 0  # a prefix of length 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), peak + tl.log2(total))
    line = (division.to(tl.int64) * rows + b) * n * H + token * H + h
    tl.store(out_ptr + line[:, None] * D + d, acc, inside[:, None] & (d < D))
    tl.store(lse_ptr + line, lse, inside)


@kernel
def cached_attention_fwd_merge_kernel(
    parts_ptr, lse_ptr, out_ptr, lines, COUNT,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The mean of COUNT parts, weighted with their softmaxes' sums, one after the other."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = line < lines
    d = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    place = line
    for _ in range(COUNT):
        lse = tl.load(lse_ptr + place, inside, 0.0)
        values = tl.load(parts_ptr + place[:, None] * D + d, inside[:, None] & (d < D), 0.0)
        highest = tl.maximum(peak, lse)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight, decay = tl.exp2(lse - base), tl.exp2(peak - base)
        acc = acc * decay[:, None] + values * weight[:, None]
        total = total * decay + weight
        peak = highest
        place += lines
    tl.store(out_ptr + line[:, None] * D + d, acc / total[:, None], inside[:, None] & (d < D))


class _Part(NamedTuple):
    """Keys and values (B / share, N, H, D), and how many keys a program takes."""

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None
    split: int

    @property
    def divisions(self) -> int:
        return cdiv(self.k.shape[1], self.split)


def forward(call: CachedAttentionCall) -> torch.Tensor:
    """See the reference."""
    q, softmax_scale = call.q, call.softmax_scale
    batch, n, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if softmax_scale < 0:  # the greatest score is the greatest product's
        q, softmax_scale = -q, -softmax_scale
    q = rows_adjacent(q)
    parts = [
        _Part(
            rows_adjacent(keys),
            rows_adjacent(values),
            None if lengths is None else lengths.contiguous(),
            SPLIT if n < FEW else keys.shape[1],
        )
        for keys, values, lengths in call.parts
        if keys.shape[1]
    ]
    if not parts:
        return out.zero_()
    count = sum(part.divisions for part in parts)
    partial = out if count == 1 else torch.empty(count, *q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(count, batch, n, heads, dtype=torch.float32, device=q.device)
    size = PART.choose(card(q.device), bits=8 * q.element_size(), head_dim=head_dim, queries=n)
    options = {**constants(head_dim, q.dtype), **size}
    first = 0
    for part in parts:
        share = batch // part.k.shape[0]
        target = out if count == 1 else partial[first:]
        tiles = cdiv(share * n, size["BLOCK_M"])
        cached_attention_fwd_kernel[(tiles * part.divisions * part.k.shape[0] * heads,)](
            q, part.k, part.v, part.lengths, target, lse[first:],
            *q.stride()[:3], *part.k.stride()[:3], *part.v.stride()[:3], batch, n, share, part.k.shape[1], heads,
            part.split, part.divisions, softmax_scale * LOG2_E.value, ALIGNED=common_factor(part.k, part.v), **options,
        )  # fmt: skip
        first += part.divisions
    if count > 1:
        lines = batch * n * heads
        cached_attention_fwd_merge_kernel[(cdiv(lines, MERGED),)](
            partial, lse, out, lines, count, D=head_dim, BLOCK_D=power_of_2(head_dim), ROWS=MERGED,
            num_warps=4,
        )  # fmt: skip
    return out
