"""For attention that knows no group: the prefix before each sample's own tokens, and a call for each scale."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvar.schedule import ScaleSchedule

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def with_prefix(shared: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
    """(B, P + L, H, D) of a prefix (B/G, P, H, D), copied for the samples of its group, and own tokens (B, L, H, D)."""
    if shared is None:
        return own
    own = own.unflatten(0, (shared.shape[0], -1))  # [B/G, G, L, H, D]
    copies = shared[:, None].expand(-1, own.shape[1], -1, -1, -1)
    return torch.cat((copies, own), 2).flatten(0, 1)


def by_scale(
    attend: Attend,
    package: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    softmax_scale: float,
    block_diagonal: bool,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, by `attend(q, k, v, softmax_scale)` of (B, ., H, D) without a mask, one call a scale.

    Raises:
        ValueError: a prefix of several lengths, or the log-sum-exp, which such packages do not differentiate.
    """
    for argument, given in (("prefix.lengths", prefix_lengths is not None), ("with_lse", with_lse)):
        if given:
            raise ValueError(f"block_causal_attention: {argument}: expected none for backend={package!r}, got one")
    nothing = torch.empty(0, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if not q.numel():
        return torch.empty_like(q), nothing
    prefix = 0 if prefix_k is None else prefix_k.shape[1]
    k, v = with_prefix(prefix_k, k), with_prefix(prefix_v, v)
    outputs = []
    for start, end in zip(schedule.starts, schedule.ends, strict=True):
        parts = [slice(0, prefix + end)]
        if block_diagonal:
            parts = [slice(0, prefix), slice(prefix + start, prefix + end)]
        keys, values = (t[:, parts[0]] if len(parts) == 1 else torch.cat([t[:, s] for s in parts], 1) for t in (k, v))
        outputs.append(attend(q[:, start:end], keys, values, softmax_scale))
    return torch.cat(outputs, 1), nothing
