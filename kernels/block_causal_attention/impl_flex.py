"""Block-causal attention by PyTorch's FlexAttention, with a block mask in closed form.

FlexAttention knows no group: each sample reads a copy of its prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall

TILE = 128
GRAPHS = 256  # that are kept compiled at most


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    q, k, v, prefix = call.q, call.k, call.v, call.prefix
    if not q.numel():
        nothing = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        return torch.empty_like(q), nothing
    tokens = 0
    if prefix is not None:
        tokens = prefix.k.shape[1]
        k, v = with_prefix(prefix.k, k), with_prefix(prefix.v, v)
    if prefix is None or prefix.lengths is None:
        mask = block_mask(call.schedule, tokens, call.block_diagonal, q.device)
    else:
        lengths = prefix.lengths.repeat_interleave(q.shape[0] // max(prefix.lengths.shape[0], 1))
        mask = ragged_block_mask(call.schedule, tokens, call.block_diagonal, lengths)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = _attend(q, k, v, block_mask=mask, scale=call.softmax_scale, return_lse=True)
    return out.transpose(1, 2).contiguous(), lse


def with_prefix(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(B, P + L, H, D) of a prefix (B/G, P, H, D), copied for the samples of its group, and own tokens (B, L, H, D)."""
    own = own.unflatten(0, (shared.shape[0], -1))  # [B/G, G, L, H, D]
    copies = shared[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat((copies, own), 2).flatten(0, 1)


class _Tiles(NamedTuple):
    """Tiles of the scores (L, P + L), as `BlockMask.from_kv_blocks` takes them: of each row of tiles the number and the
    columns of those that need a mask, and of those that are seen whole; the keys of the image that each row sees."""

    masked: tuple[torch.Tensor, torch.Tensor]
    whole: tuple[torch.Tensor, torch.Tensor]
    first: torch.Tensor  # (L,)
    end: torch.Tensor  # (L,)


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)  # it may be made there, and is kept
def block_mask(schedule: ScaleSchedule, prefix: int, block_diagonal: bool, device: torch.device) -> BlockMask:
    """The mask of a prefix that is valid as a whole."""
    tiles = _tiles(schedule, prefix, block_diagonal, False, device)
    return _block_mask(tiles, prefix, partial(_visible, prefix, tiles.first, tiles.end))


def ragged_block_mask(schedule: ScaleSchedule, prefix: int, block_diagonal: bool, lengths: torch.Tensor) -> BlockMask:
    """The mask of a prefix of which row b has `lengths[b]` valid tokens."""
    tiles = _tiles(schedule, prefix, block_diagonal, True, lengths.device)

    def valid(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ((j >= prefix) | (j < lengths[b])) & _visible(prefix, tiles.first, tiles.end, b, h, i, j)

    return _block_mask(tiles, prefix, valid)


def _visible(
    prefix: int,
    first: torch.Tensor,
    end: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
) -> torch.Tensor:
    return (j < prefix) | ((j >= prefix + first[i]) & (j < prefix + end[i]))


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)  # it may be made there, and is kept
def _tiles(schedule: ScaleSchedule, prefix: int, block_diagonal: bool, ragged: bool, device: torch.device) -> _Tiles:
    """First and end of the visible keys rise with the row: a tile's first and last row decide."""
    scales = torch.tensor(schedule.scale_of_token, device="cpu")
    first = torch.tensor(schedule.starts, device="cpu")[scales] * block_diagonal
    end = torch.tensor(schedule.ends, device="cpu")[scales]
    top = torch.arange(0, len(scales), TILE, device="cpu")[:, None]
    bottom = (top + TILE).clamp(max=len(scales)) - 1
    left = torch.arange(0, prefix + len(scales), TILE, device="cpu") - prefix  # counted from the image's first token
    right = (left + TILE).clamp(max=len(scales))
    seen = (left < 0) | ((right > first[top]) & (left < end[bottom]))  # [rows of tiles, columns of tiles]
    after_first = left >= torch.where(first[bottom] == 0, -prefix, first[bottom])
    whole = ((right <= 0) | (after_first & (right <= end[top]))) & (left >= (0 if ragged else -prefix))
    counted = []
    for tiles in (seen & ~whole, whole):
        tiles = tiles[None, None]
        order = tiles.int().argsort(dim=-1, descending=True, stable=True)  # those that are set come first
        counted.append((tiles.sum(-1, dtype=torch.int32).to(device), order.int().to(device)))
    return _Tiles(counted[0], counted[1], first.to(device), end.to(device))


def _block_mask(tiles: _Tiles, prefix: int, visible: Callable[..., torch.Tensor]) -> BlockMask:
    length = len(tiles.end)
    return BlockMask.from_kv_blocks(
        *tiles.masked, *tiles.whole, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(length, prefix + length)
    )


def _attend(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Each schedule and prefix is a graph of its own, with and without gradients, and PyTorch would stop at eight.
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        return _compiled()(*args, **options)


@cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: past the limit of graphs an error, not the form that holds all scores
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
