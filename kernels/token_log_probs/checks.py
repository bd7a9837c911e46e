"""What the reference and the implementations alike ask of the tokens."""

from __future__ import annotations

import torch


def check_range(tokens: torch.Tensor, size: int) -> None:
    """Raise a ValueError for tokens that are not below `size`, or bits other than 0 and 1. On another device than the
    CPU the check would wait for it; there a token out of range is the caller's to avoid."""
    if tokens.device.type != "cpu" or tokens.dtype == torch.bool or tokens.numel() == 0:
        return
    low, high = (int(value) for value in tokens.aminmax())
    most = 1 if tokens.ndim == 3 else size - 1
    if low < 0 or high > most:
        raise ValueError(f"token_log_probs: tokens: expected values from 0 to {most}, got {low} to {high}")
