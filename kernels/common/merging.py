"""Attention in parts: the result for some keys and that for others, for implementations on CPUs."""

from __future__ import annotations

import torch


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Adds to results (., n, H, D) of some keys, with their log-sum-exp (., n, H), those of other keys."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_()[..., None]).addcmul_(other.to(out.dtype), (other_lse - total).exp_()[..., None])
    lse.copy_(total)
