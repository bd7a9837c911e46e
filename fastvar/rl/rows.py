"""Rows of tensors on a device, chosen by indices that the host knows, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def indices(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n,) int64 on a device."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def taken(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`tensor[rows]`; a view where the rows are adjacent."""
    if len(rows) and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor.index_select(0, indices(rows, tensor.device))
