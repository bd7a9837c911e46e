"""Maps over images, tile by tile, where the memory for the whole is short."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch


class _Span(NamedTuple):
    """Along one side a tile first : last of cells, and what is computed for it, start : end."""

    first: int
    last: int
    start: int
    end: int


def _spans(size: int, tile: int, overlap: int) -> list[_Span]:
    firsts = range(0, size, tile)
    return [
        _Span(first, min(first + tile, size), max(first - overlap, 0), min(first + tile + overlap, size))
        for first in firsts
    ]


def _weights(span: _Span, size: int, scale: int, overlap: int, device: torch.device) -> torch.Tensor:
    """How much of each pixel comes from this tile: all but within overlap / 2 cells of its neighbours' first and last
    cells, where it falls linearly to none."""
    cells = (torch.arange(span.start * scale, span.end * scale, device=device) + 0.5) / scale
    weights = torch.ones_like(cells)
    if overlap and span.first > 0:
        weights *= ((cells - span.first) / overlap + 0.5).clamp(0, 1)
    if overlap and span.last < size:
        weights *= ((span.last - cells) / overlap + 0.5).clamp(0, 1)
    return weights


def in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], cells: torch.Tensor, tile: int, overlap: int
) -> torch.Tensor:
    """`function` of cells (B, c, h, w), an image of a whole number of pixels a cell, put together from tiles.

    Each tile is computed with `overlap` cells more at each side and fades into its neighbours over as many, in the
    middle of what both have. What depends on no more than overlap / 2 cells around a pixel is as without tiles, to
    rounding.

    Args:
        function: (B, c, h', w') to (B, C, s h', s w'), for an s of its own.
        cells: (B, c, h, w).
        tile: cells of a tile's side, at least 1; the whole at once if no side is longer.
        overlap: cells, 0 to `tile`.

    Returns:
        (B, C, s h, s w).
    """
    height, width = cells.shape[2:]
    if tile >= max(height, width):
        return function(cells)
    out: torch.Tensor | None = None
    for rows, columns in product(_spans(height, tile, overlap), _spans(width, tile, overlap)):
        part = function(cells[:, :, rows.start : rows.end, columns.start : columns.end])
        scale, device = part.shape[2] // (rows.end - rows.start), part.device
        if out is None:
            dtype = torch.promote_types(part.dtype, torch.float32)
            out = part.new_zeros(*part.shape[:2], height * scale, width * scale, dtype=dtype)
        down = _weights(rows, height, scale, overlap, device)
        across = _weights(columns, width, scale, overlap, device)
        place = (slice(rows.start * scale, rows.end * scale), slice(columns.start * scale, columns.end * scale))
        out[:, :, place[0], place[1]] += part * (down[:, None] * across)
    assert out is not None
    return out.to(part.dtype)
