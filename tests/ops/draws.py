"""What drawn tokens are judged by where rounding decides."""

from __future__ import annotations

import torch


def distance(tokens: torch.Tensor, draws: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """How far draws (M,), uniform numbers, lie outside of what tokens (M,) have of [0, 1) in index order, given the
    logits (M, V) in float64, minus infinity where they are dropped. At most 0 for the right tokens."""
    probs = kept.softmax(-1)
    high = probs.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    low = high - probs.gather(-1, tokens[:, None])[:, 0]
    return torch.maximum(low - draws, draws - high)
