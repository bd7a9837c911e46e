"""The middle return of VMR: what a coarse state is worth, from the rewards of its continuations."""

from __future__ import annotations

import math

import torch


def middle_returns(rewards: torch.Tensor, continuations: int, *, eta: float = 1.0) -> torch.Tensor:
    """V = eta log mean_k exp(R_k / eta) of each coarse state over its K continuations.

    Args:
        rewards: (B K,), the continuations of a state adjacent, as `SamplingState.fork(K)` orders them. One that is NaN
            or infinite counts as missing; a state without any is NaN.
        continuations: K, at least 1.
        eta: temperature, above 0. Towards 0 the best continuation counts; math.inf gives the plain mean.

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
    groups = rewards.view(-1, continuations)
    valid = groups.isfinite()
    count = valid.sum(1)
    mean = torch.where(valid, groups, 0).sum(1) / count  # NaN where nothing is valid
    if math.isinf(eta):
        return mean
    # Around the mean, so that a large eta loses no digits: V = mean + eta log mean exp((R - mean) / eta). expm1 and
    # log1p keep what exp and log would round away.
    gaps = torch.where(valid, groups - mean[:, None], 0) / eta
    largest = torch.where(valid, gaps, -math.inf).amax(1)
    small = torch.where(valid, gaps.expm1(), 0).sum(1) / count
    shifted = torch.where(valid, (gaps - largest[:, None]).exp(), 0).sum(1) / count
    soft = torch.where(largest < 1, small.log1p(), largest + shifted.log())
    return mean + eta * soft.clamp_min(0)
