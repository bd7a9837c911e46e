"""Block-causal attention by the package flash-attn-4 on Hopper and Blackwell: one call with a mask function.

A tile of the scores that no query sees is left out, one that is seen whole has no mask. Which these are depends on the
schedule alone, so that the lists of tiles are made once. Which keys a query sees the mask function reads from two
tensors, so that one compiled kernel serves all schedules.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from fastvar.kernels.block_causal_attention.by_scale import Part, Scales
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch, compute_dq_write_order
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

COLUMNS = 128
ROWS = 128  # in the backward pass
LARGEST_ROWS = 256  # in a forward pass
# With lengths and more rows than that its backward pass looks for lengths of the queries too.
MOST_LENGTHS = 256


def forward_rows(major: int, width: int) -> int:
    """Queries of a tile in the forward pass for a compute capability and head dimension: those of the kernel itself, as
    fewer tiles are left out by larger ones. Blackwell's takes two of its tiles together."""
    if major == 10:
        return 256
    return 192 if width <= 96 else 128


@cute.jit
def visible(batch, head, row, column, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """Whether a query sees a key: the first one that it sees and the one past the last are in `aux_tensors`."""
    first = utils.scalar_to_ssa(aux_tensors[0][row[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][row[0]], cutlass.Int32)
    return (column >= first) & (column < end)


class FlashAttention4:
    name = "flash_attn"
    takes_lengths = True

    def __init__(self, major: int) -> None:
        self.major = major

    @property
    def takes_scales(self) -> tuple[int, int]:
        """Tiles have other sizes beyond 128. On Hopper a gradient by lists of tiles adds up in any order: where
        somebody asked for the same bits from run to run it goes a scale at a time."""
        return 128, 128 if self.major == 10 or not torch.are_deterministic_algorithms_enabled() else 0

    def attend(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {}
        if isinstance(part.seen, Scales):
            masks = self._masks(part)
            options = {"mask_mod": visible, "aux_tensors": masks.bounds, "block_sparse_tensors": masks.forward}
        elif part.seen is not None:
            options = {"seqused_k": _used(part.seen, part.k)}
        out, lse, *_ = _flash_attn_fwd(*part.tensors, softmax_scale=part.scale, return_lse=True, **options)
        return out, lse

    def gradients(
        self, part: Part, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tensors = (*part.tensors, out, grad, lse)
        options: dict[str, Any] = {"softmax_scale": part.scale, "deterministic": True}
        if not isinstance(part.seen, torch.Tensor):
            if part.seen is not None:
                masks = self._masks(part)
                options |= {"mask_mod": visible, "aux_tensors": masks.bounds, "block_sparse_tensors": masks.backward}
                options["deterministic"] = self.major == 10
            dq, dk, dv, *_ = _flash_attn_bwd(*tensors, **options)
            return dq, dk, dv
        # gradients past a length are not written: they are zero before
        dq = torch.empty(part.q.shape, dtype=part.q.dtype, device=part.q.device)
        dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (part.k, part.v))
        used = _used(part.seen, part.k)
        for start in range(0, len(used), MOST_LENGTHS):
            rows = slice(start, start + MOST_LENGTHS)
            places = {"dq": dq[rows], "dk": dk[rows], "dv": dv[rows]}
            _flash_attn_bwd(*(t[rows] for t in tensors), seqused_k=used[rows], **places, **options)
        return dq, dk, dv

    def _masks(self, part: Part) -> _Masks:
        assert isinstance(part.seen, Scales)
        return _masks(part.seen, forward_rows(self.major, part.q.shape[-1]), part.q.device)


class _Masks(NamedTuple):
    """What flash-attn-4 wants to know of a schedule."""

    bounds: list[torch.Tensor]  # two int32 of the L tokens, and of what a tile reads past them
    forward: BlockSparseTensorsTorch
    backward: BlockSparseTensorsTorch


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)  # it may be made there, and is kept
def _masks(scales: Scales, rows: int, device: torch.device) -> _Masks:
    of_token = torch.tensor(scales.schedule.scale_of_token, device="cpu")
    first = torch.tensor(scales.schedule.starts, device="cpu")[of_token] * scales.block_diagonal
    end = torch.tensor(scales.schedule.ends, device="cpu")[of_token]
    forward = _listed(*_tiles(first, end, rows))
    masked, whole = _tiles(first, end, ROWS)
    by_row, by_column = _listed(masked, whole), _listed(masked.mT, whole.mT)
    # the gradient of a query's tile is added up over tiles of keys in the order of these numbers
    order = compute_dq_write_order(*by_row, *by_column)
    read = [torch.cat([bound, bound[-1:].expand(LARGEST_ROWS - 1)]) for bound in (first, end)]
    bounds, forward, backward, order = (
        [t.int().contiguous().to(device) for t in tensors] for tensors in (read, forward, by_column, order)
    )
    return _Masks(
        bounds,
        BlockSparseTensorsTorch(*forward, block_size=(rows, COLUMNS)),
        BlockSparseTensorsTorch(
            *backward,
            block_size=(ROWS, COLUMNS),
            dq_write_order=order[0],
            dq_write_order_full=order[1],
            spt=False,  # these numbers rise with the keys
        ),
    )


def _tiles(first: torch.Tensor, end: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of the scores (rows of tiles, columns of tiles) are seen in part, and which are seen whole; one that
    reaches past the last token never is. Bounds rise with the row: the first and last decide."""
    length = len(first)
    top = torch.arange(0, length, rows, device="cpu")[:, None]
    bottom = (top + rows).clamp(max=length) - 1
    left = torch.arange(0, length, COLUMNS, device="cpu")
    right = left + COLUMNS
    seen = (right > first[top]) & (left < end[bottom])
    whole = (left >= first[bottom]) & (right <= end[top]) & (top + rows <= length)
    return seen & ~whole, whole


def _listed(masked: torch.Tensor, whole: torch.Tensor) -> list[torch.Tensor]:
    """For each row of tiles how many are set (1, 1, M) and their columns (1, 1, M, N), rising; of both kinds."""
    blocks = []
    for tiles in (masked, whole):
        tiles = tiles[None, None]
        order = tiles.int().argsort(dim=-1, descending=True, stable=True)  # those that are set come first
        blocks += [tiles.sum(-1, dtype=torch.int32), order.int()]
    return blocks


def _used(lengths: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return lengths.clamp(1, k.shape[1]).int()
