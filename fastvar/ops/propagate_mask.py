"""A mask on the finest grid, or boxes in an image, brought to the tokens of every scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._extension import extension_implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation
from fastvar.schedule import ScaleSchedule


class PropagateMaskCall(NamedTuple):
    """A call of `propagate_mask`: mask (B, H, W)."""

    mask: torch.Tensor
    schedule: ScaleSchedule
    footprint: str
    soft: bool


def _fake(call: PropagateMaskCall) -> torch.Tensor:
    dtype = torch.float32 if call.soft else torch.bool
    return call.mask.new_empty(call.mask.shape[0], call.schedule.num_tokens, dtype=dtype)


_OPERATOR = Operator(
    "propagate_mask",
    PropagateMaskCall,
    fake=_fake,
    implementations=[
        triton_implementation(
            "propagate_mask", dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.bool), verified=("H200",)
        ),
        extension_implementation(
            "cpu", "fastvar.kernels.propagate_mask.impl_cpp", op="propagate_mask", verified=("CPU",)
        ),
        extension_implementation(
            "cuda", "fastvar.kernels.propagate_mask.impl_cuda", op="propagate_mask", verified=("H200",)
        ),
        Implementation("reference", "fastvar.kernels.propagate_mask.reference", verified=("CPU", "H200")),
    ],
    choices=[Choice("triton"), Choice("cuda")],
    differentiable=False,
)


def propagate_mask(
    mask: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    footprint: str = "area",
    soft: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Which tokens of every scale a mask on the finest grid concerns: those with a cell of it under their footprint.

    Footprints are rectangles of fine cells, the product of an interval of rows and one of columns. For token i of a
    scale with h rows, on a finest grid with H rows:

    * "area": rows floor(i H / h) to ceil((i + 1) H / h), end excluded: what is averaged into the token. Neighbours
      overlap where h does not divide H.
    * "support": the rows that the token's code changes: those whose bicubic upsampling reads it (four taps; itself
      alone at the finest grid), and one more on each side for the 3x3 convolution phi.

    Args:
        mask: (B, H, W) with (H, W) = schedule.finest, bool or floating (0 to 1), any strides.
        schedule: the K grids.
        footprint: "area" or "support".
        soft: return how much of the footprint is covered rather than whether any of it is.
        backend: see `fastvar.support()`.

    Returns:
        (B, L), contiguous: bool, true where any cell of the footprint is above 0; with `soft` float32, the mean of the
        mask over the footprint. It carries no gradient.

    Raises:
        ValueError: a mask of another shape or dtype, an unknown footprint. With FASTVAR_DEBUG=1 also a mask that is not
            finite; without, what is not may spread with `soft` to tokens whose footprint does not hold it.

    Source: VAR RL Done Right (arXiv 2601.02256), mask propagation.
    """
    op = "propagate_mask"
    _checks.schedule(op, schedule)
    _checks.shape(op, "mask", mask, "B", *schedule.finest)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _checks.fail(op, "mask", "a bool or floating-point tensor", mask.dtype)
    _checks.finite(op, "mask", mask)
    if footprint not in ("area", "support"):
        _checks.fail(op, "footprint", "'area' or 'support'", repr(footprint))
    return _OPERATOR(PropagateMaskCall(mask.detach(), schedule, footprint, soft), backend)


def boxes_to_mask(
    boxes: torch.Tensor | Sequence[torch.Tensor],
    image_size: tuple[int, int],
    schedule: ScaleSchedule,
) -> torch.Tensor:
    """The cells of the finest grid that a box overlaps with a positive area.

    Args:
        boxes: (B, N, 4), or B tensors (N_i, 4): the edges x0, y0, x1, y1 in pixels of the image. Parts outside the
            image are cut off; a box that is empty (x1 <= x0 or y1 <= y0) or has a NaN is left out, which is how a
            batch of unequal counts can be padded.
        image_size: (height, width) of the image in pixels.
        schedule: its last grid covers the image.

    Returns:
        (B, H, W) bool on the boxes' device, (H, W) = schedule.finest. Compared in float64.

    Raises:
        ValueError: boxes of another shape, an image without pixels.
    """
    op = "boxes_to_mask"
    _checks.schedule(op, schedule)
    if min(image_size) < 1:
        _checks.fail(op, "image_size", "positive height and width", tuple(image_size))
    if not isinstance(boxes, torch.Tensor):
        for i, some in enumerate(boxes):
            _checks.shape(op, f"boxes[{i}]", some, "N", 4)
        if not boxes:
            return torch.zeros(0, *schedule.finest, dtype=torch.bool)
        boxes = torch.nn.utils.rnn.pad_sequence([some.double() for some in boxes], True, torch.nan)
    _checks.shape(op, "boxes", boxes, "B", "N", 4)
    x0, y0, x1, y1 = boxes.double()[..., None].unbind(2)  # [B, N, 1] each
    real = (x0 < x1) & (y0 < y1)
    height, width = schedule.finest
    rows = _overlaps(y0, y1, image_size[0], height) & real  # [B, N, H]
    columns = _overlaps(x0, x1, image_size[1], width) & real  # [B, N, W]
    return rows.float().mT @ columns.float() > 0


def _overlaps(low: torch.Tensor, high: torch.Tensor, pixels: int, cells: int) -> torch.Tensor:
    """(B, N, cells): the intervals low to high (B, N, 1) overlap a cell, `cells` of which divide the pixels evenly."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) * pixels  # in units of 1 / cells pixels
    return (low * cells < edges[1:]) & (high * cells > edges[:-1])
