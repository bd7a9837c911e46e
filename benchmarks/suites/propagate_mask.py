"""A mask on the finest grid to the tokens of every scale. Nobody else has this; the rivals are what one would write
instead: pooling or products with footprints scale by scale, torch.compile of that, and an integral image for all scales
at once.

The mask is float32 (0 or 1), so that no rival has to convert it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import propagate_mask
from fastvar.schedule import ScaleSchedule

OP = "propagate_mask"


def interval(i: int, coarse: int, fine: int, footprint: str) -> tuple[int, int]:
    """The fine cells of token i of `coarse` along one axis, end excluded."""
    if footprint == "area":
        return i * fine // coarse, -(-(i + 1) * fine // coarse)
    if coarse == fine:  # the token alone, widened by phi
        return max(i - 1, 0), min(i + 2, fine)
    # Bicubic upsampling of fine cell y reads the four tokens from b - 1 to b + 2, b = floor((y + 1/2) coarse / fine -
    # 1/2); those beyond an edge are the token at the edge.
    read = []
    for y in range(fine):
        second = ((2 * y + 1) * coarse - fine) // (2 * fine)
        if i in {min(max(second + tap, 0), coarse - 1) for tap in (-1, 0, 1, 2)}:
            read.append(y)
    return max(read[0] - 1, 0), min(read[-1] + 2, fine)


def footprint_matrices(
    schedule: ScaleSchedule, footprint: str, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each scale (h, H) and (w, W) float32, 1 where a fine row or column belongs to a token."""

    def matrix(coarse: int, fine: int) -> torch.Tensor:
        cells = torch.zeros(coarse, fine)
        for i in range(coarse):
            low, high = interval(i, coarse, fine, footprint)
            cells[i, low:high] = 1
        return cells.to(device)

    height, width = schedule.finest
    return [(matrix(h, height), matrix(w, width)) for h, w in schedule]


def pooled(mask: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """The footprint "area", scale by scale."""
    return torch.cat([F.adaptive_avg_pool2d(mask, grid).flatten(1) > 0 for grid in schedule], 1)


def multiplied(mask: torch.Tensor, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Any footprint, scale by scale."""
    return torch.cat([(rows @ mask @ columns.T).flatten(1) > 0 for rows, columns in matrices], 1)


def integral_image(schedule: ScaleSchedule, footprint: str, device: torch.device) -> Callable[..., Any]:
    """Any footprint, all scales at once: cells on under a rectangle are four entries of the mask's integral image."""
    height, width = schedule.finest
    corners: list[list[int]] = [[], [], [], []]
    for h, w in schedule:
        for i in range(h):
            top, bottom = interval(i, h, height, footprint)
            for j in range(w):
                left, right = interval(j, w, width, footprint)
                for corner, (y, x) in zip(
                    corners, ((bottom, right), (top, right), (bottom, left), (top, left)), strict=True
                ):
                    corner.append(y * (width + 1) + x)
    a, b, c, d = (torch.tensor(corner, device=device) for corner in corners)

    def run(mask: torch.Tensor) -> torch.Tensor:
        sums = F.pad(mask.cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
        return sums[:, a] - sums[:, b] - sums[:, c] + sums[:, d] > 0

    return run


def share_of_different(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or found.dtype != torch.bool:
        return float("inf")
    return (found != expected).double().mean().item()


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, footprint = MODELS[setting["model"]], setting["batch"], setting["footprint"]
    schedule = shape.schedule
    height, width = schedule.finest
    # a rectangle in each image, from a sixth to half of its sides
    y, x = (torch.arange(side, device=device) for side in (height, width))
    low, size = torch.rand(2, batch, 2, 1, device=device)
    low, size = low / 2, size / 3 + 1 / 6
    rows, columns = (
        (low[:, i] <= at / side) & (at / side < low[:, i] + size[:, i])
        for i, (at, side) in enumerate(((y, height), (x, width)))
    )
    mask = (rows[:, :, None] & columns[:, None]).to(dtype)
    matrices = footprint_matrices(schedule, footprint, device)
    eager = partial(pooled, schedule=schedule) if footprint == "area" else partial(multiplied, matrices=matrices)
    contenders, backend = own(OP, mask, partial(propagate_mask, schedule=schedule, footprint=footprint))
    contenders |= {
        "eager": eager,
        "integral image": integral_image(schedule, footprint, device),
        "torch.compile": compiled(eager, setting),
    }
    return Problem(
        {"mask": mask},
        contenders,
        backend=backend,
        reference=lambda mask: multiplied(mask, [(r.to(mask.dtype), c.to(mask.dtype)) for r, c in matrices]),
        check=share_of_different,
        limit=0.0,
        bytes=mask.numel() * mask.element_size() + batch * shape.tokens,
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "footprint": "area", "dtype": "float32"},
            {"model": "tiny", "batch": 2, "footprint": "support", "dtype": "float32"},
        ],
        "cpu": [
            {"model": "VAR-d16", "batch": 2, "footprint": "area", "dtype": "float32"},
            {"model": "VAR-d16", "batch": 2, "footprint": "support", "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "batch": 64, "footprint": "area", "dtype": "float32"},
            {"model": "VAR-d16", "batch": 64, "footprint": "support", "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 4, "footprint": "support", "dtype": "float32"},
        ],
    },
    (*own_names(OP), "eager", "integral image", "torch.compile"),
    build,
)
