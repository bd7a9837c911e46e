"""The loss of training an Infinity: cross-entropy of every bit, weighted by scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvar.schedule import ScaleSchedule


def bitwise_loss(logits: torch.Tensor, bits: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over images of sum_i w_i mean_j softplus(-s_ij z_ij), with s = 1 for a bit of 1 and -1 for one of 0.

    This is the cross-entropy over the two logits of each bit, of which z is the difference.

    Args:
        logits: (B, L, d), z.
        bits: (B, L, d), bool or integers 0 and 1; with self-correction the bits that correct, as
            `BSQTokenizer.quantize` returns them.
        weights: (L,), which sum to 1, see `scale_weights`; 1 / L by default.

    Returns:
        scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, bits that are floating-point numbers.

    Source: Infinity (arXiv 2412.04431), section 3.2.
    """
    if logits.ndim != 3 or bits.shape != logits.shape or bits.is_floating_point():
        raise ValueError(
            f"bitwise_loss: bits: expected bits {tuple(logits.shape)} as logits (B, L, d), "
            f"got {bits.dtype} {tuple(bits.shape)}"
        )
    if weights is not None and weights.shape != logits.shape[1:2]:
        raise ValueError(f"bitwise_loss: weights: expected ({logits.shape[1]},), got {tuple(weights.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    of_tokens = -F.logsigmoid(torch.where(bits.bool(), logits, -logits)).mean(2)
    if weights is None:
        return of_tokens.mean()
    return (of_tokens * weights.to(of_tokens.dtype)).sum(1).mean()


def scale_weights(schedule: ScaleSchedule, device: torch.device | str | None = None) -> torch.Tensor:
    """A weight for each token, (L,) float32 with sum 1, in proportion to 1 / sqrt(tokens of its scale): coarse tokens
    weigh more, and a scale in all as the square root of its tokens. What Infinity's `reweight_loss_by_scale` means."""
    total = sum(length**0.5 for length in schedule.lengths)
    scales = [(length, length**-0.5 / total) for length in schedule.lengths]
    return torch.cat([torch.full((n,), weight, dtype=torch.float32, device=device) for n, weight in scales])
