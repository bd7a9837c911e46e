"""Figures of many scores, each with its 95 % interval, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import fmean
from typing import Any

import torch

from fastvar.data.metrics import mean_interval, ratio_interval
from fastvar.image_benchmarks.items import Item


def mean_figure(name: str, values: torch.Tensor | Sequence[float]) -> dict[str, Any]:
    """The mean of values (n,) but for those that are missing (not finite): None where all are; no interval of one."""
    sample = [value for value in map(float, values) if isfinite(value)]
    return {
        name: fmean(sample) if sample else None,
        f"{name}_95": mean_interval(sample) if len(sample) > 1 else None,
    }


def ratio_figure(name: str, parts: torch.Tensor, wholes: torch.Tensor) -> dict[str, Any]:
    """The share that parts (n,) have of wholes (n,), all together; its interval is cut off at 0 and 1."""
    pairs = parts.tolist(), wholes.tolist()
    interval = None
    if len(parts) > 1:
        low, high = ratio_interval(*pairs)
        interval = max(low, 0.0), min(high, 1.0)
    return {name: sum(pairs[0]) / sum(pairs[1]), f"{name}_95": interval}


def rows_by_group(items: Sequence[Item]) -> dict[str, list[int]]:
    """The rows of each group, in the order of their first items."""
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item.group, []).append(row)
    return rows
