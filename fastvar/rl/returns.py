"""The middle return of VMR: what a coarse state is worth, from the rewards of its continuations."""

from __future__ import annotations

import math

import torch

from fastvar.statistics import centred


def middle_returns(rewards: torch.Tensor, continuations: int, *, eta: float = 1.0) -> torch.Tensor:
    """V = eta log mean_k exp(R_k / eta) of each coarse state over its K continuations.

    Args:
        rewards: (B K,), the continuations of a state adjacent, as `SamplingState.fork(K)` orders them. One that is NaN
            or infinite counts as missing; a state without any is NaN.
        continuations: K, at least 1.
        eta: temperature, above 0, as small or large as a float can be. Towards 0 the best continuation counts; math.inf
            gives the plain mean.

    Returns:
        (B,) in the rewards' dtype. Never below the mean of the rewards, never above the largest, whatever the size of
        R / eta.

    Raises:
        ValueError: settings that make no sense, a number of rewards that K does not divide.

    Source: VAR RL Done Right (arXiv 2601.02256).
    """
    if continuations < 1 or rewards.ndim != 1 or len(rewards) % continuations:
        raise ValueError(
            f"middle_returns: rewards: expected (B K,) with K = {continuations}, got {tuple(rewards.shape)}",
        )
    if not eta > 0:
        raise ValueError(f"middle_returns: eta: expected above 0, got {eta}")
    groups = rewards.detach().view(-1, continuations).sort(1).values  # or equal states would differ by rounding
    mean, deviations, _ = centred(groups)
    soft = torch.zeros_like(mean)
    if math.isfinite(eta):
        valid = groups.isfinite()
        largest = torch.where(valid, deviations, -math.inf).amax(1, keepdim=True)

        def average(values: torch.Tensor) -> torch.Tensor:
            return torch.where(valid, values, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True)

        # eta log mean exp(deviation / eta). Where the exponents are small expm1 and log1p keep what exp and log would
        # round away; where they are large, also infinite, they are taken from the largest.
        flat = eta * average((deviations / eta).expm1()).log1p()
        steep = largest + eta * average(((deviations - largest) / eta).exp()).log()
        soft = torch.minimum(torch.where(largest < eta, flat, steep).clamp_min(0), largest)
    return (mean + soft)[:, 0].to(rewards.dtype)
