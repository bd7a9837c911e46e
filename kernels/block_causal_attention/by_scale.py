"""Block-causal attention a scale at a time, by attention that knows no mask: PyTorch's own, flash-attn, xFormers.

Each scale's queries see one rectangle of keys. The samples of a group attend to their shared prefix in one call, as the
rows of one sample, so that it is read once a group and never copied; its part and that of a scale's own keys are merged
by their log-sum-exp. The backward pass is the package's, called with the merged result and log-sum-exp: the gradient of
a part depends on the other parts through these two alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from fastvar.schedule import ScaleSchedule


class Scales(NamedTuple):
    """Queries and keys of all scales in one call."""

    schedule: ScaleSchedule
    block_diagonal: bool


Seen = torch.Tensor | Scales | None


class Package(Protocol):
    """Attention of q (B, n, H, D) over keys and values (B, m, H, D): over all of them, with lengths (B,) over the first
    of them, at least one, or as `Scales` has it. lse (B, H, n) in float32 (float64 for float64), contiguous."""

    name: str
    takes_lengths: bool
    # the largest head dimensions for which it is called once for all scales, forward and for the gradient
    takes_scales: tuple[int, int]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the result (B, n, H, D) and lse."""

    def gradients(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        seen: Seen,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, in memory of their own. out and lse may be those of more keys than k."""


class ByScale:
    """`forward` and `backward` of an implementation that calls a package for each scale."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def forward(
        self,
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
        """See the reference; lse (B, H, L) is always there.

        Raises:
            ValueError: a prefix of several lengths that the package does not take.
        """
        if prefix_lengths is not None and not self.package.takes_lengths:
            raise ValueError(
                f"block_causal_attention: prefix.lengths: expected none for backend={self.package.name!r}, got one"
            )
        batch, length, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = out.new_empty(batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))
        if not q.numel():
            return out, lse
        q, k, v = _plain(q), _plain(k), _plain(v)
        if prefix_k is not None and prefix_v is not None and prefix_k.shape[1]:
            groups = prefix_k.shape[0]
            other, other_lse = self.package.attend(
                _packed(q, groups), _plain(prefix_k), _plain(prefix_v), softmax_scale, prefix_lengths
            )
            other, other_lse = other.reshape(q.shape), _unpacked(other_lse, batch)
            if prefix_lengths is not None:
                other_lse = other_lse.masked_fill(_empty(prefix_lengths, batch), -torch.inf)
        else:
            other = None
        # the largest first: while it runs, the host asks for the others
        for rows, keys, seen in reversed(_parts(schedule, block_diagonal, q.shape[-1] <= self.package.takes_scales[0])):
            part, part_lse = self.package.attend(q[:, rows], k[:, keys], v[:, keys], softmax_scale, seen)
            if other is None:
                out[:, rows], lse[:, :, rows] = part, part_lse
                continue
            total = torch.logaddexp(part_lse, other_lse[:, :, rows])
            ours, theirs = (_per_row((lse - total).exp()) for lse in (part_lse, other_lse[:, :, rows]))
            out[:, rows] = torch.addcmul(part * ours, other[:, rows], theirs)  # in float32, rounded once
            lse[:, :, rows] = total
        return out, lse

    def backward(
        self,
        grads: Sequence[torch.Tensor | None],
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
        results: Sequence[torch.Tensor],
        needs: Sequence[bool],
    ) -> list[torch.Tensor]:
        """Gradients of q, k, v and of the prefix's keys and values, as far as they are needed."""
        out, lse = results
        grad, grad_lse = grads
        given = (q, k, v, prefix_k, prefix_v)
        wanted = [t for t, need in zip(given, needs, strict=False) if need and t is not None]
        if not q.numel() or (grad is None and grad_lse is None):
            return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in wanted]
        batch = q.shape[0]
        g = torch.zeros_like(out) if grad is None else _plain(grad.to(q.dtype))
        q, k, v = _plain(q), _plain(k), _plain(v)
        dq = prefix_dk = prefix_dv = None
        if prefix_k is not None and prefix_v is not None:
            prefix_dk, prefix_dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (prefix_k, prefix_v))
            if prefix_k.shape[1]:
                groups = prefix_k.shape[0]
                some_lse = lse
                if prefix_lengths is not None:  # infinite: the keys of an empty prefix had no weight
                    some_lse = lse.masked_fill(_empty(prefix_lengths, batch), torch.inf)
                dq, prefix_dk, prefix_dv = self._gradients(
                    _packed(g, groups), _packed(q, groups), _plain(prefix_k), _plain(prefix_v), _packed(out, groups),
                    _packed(some_lse.transpose(1, 2), groups).transpose(1, 2).contiguous(),
                    None if grad_lse is None else _packed(grad_lse.transpose(1, 2), groups).transpose(1, 2),
                    softmax_scale, prefix_lengths,
                )  # fmt: skip
                dq = dq.reshape(q.shape)
        add_q = dq is not None
        wide = torch.promote_types(q.dtype, torch.float32)  # what is added up is rounded once, at the end
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq.to(wide).contiguous()
        dk = dv = None
        # the last scale comes first: it sees all keys, and the gradients of the others are added to its own
        parts = _parts(schedule, block_diagonal, q.shape[-1] <= self.package.takes_scales[1])
        for rows, keys, seen in reversed(parts):
            part_q, part_k, part_v = self._gradients(
                g[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows].contiguous(),
                None if grad_lse is None else grad_lse[:, :, rows], softmax_scale, seen,
            )  # fmt: skip
            if add_q:
                dq[:, rows] += part_q
            else:
                dq[:, rows] = part_q
            if dk is None or dv is None:
                if part_k.shape == k.shape:
                    kept = part_k.dtype if len(parts) == 1 else wide
                    dk, dv = part_k.to(kept).contiguous(), part_v.to(kept).contiguous()
                    del part_q, part_k, part_v
                    continue
                dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
            if block_diagonal:
                dk[:, keys], dv[:, keys] = part_k, part_v
            else:
                dk[:, keys] += part_k
                dv[:, keys] += part_v
            del part_q, part_k, part_v  # before the next call, which has as much of its own
        found = (dq, dk, dv, prefix_dk, prefix_dv)
        return [t.to(q.dtype).contiguous() for t, need in zip(found, needs, strict=False) if need and t is not None]

    def _gradients(
        self,
        g: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        slopes: torch.Tensor | None,
        scale: float,
        seen: Seen,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The package's, and what `slopes` (B, H, n), the gradient of the log-sum-exp, adds.

        Its gradient by the scores are the weights: q gets the weighted sum of keys, which is attention with the keys as
        values, and k the weighted sum of queries, which is the gradient of these values."""
        dq, dk, dv = self.package.gradients(g, q, k, v, out, lse, scale, seen)
        if slopes is not None:
            steep = _per_row(slopes * scale)
            mean, mean_lse = self.package.attend(q, k, k, scale, seen)
            share = _per_row((mean_lse - lse).exp())  # of all keys that the row sees, those here
            weighted = (q * steep).to(q.dtype)
            dq = (dq + mean * (steep * share)).to(dq.dtype)
            dk = dk + self.package.gradients(weighted, q, k, k, out, lse, scale, seen)[2]
        return dq, dk, dv


def _parts(schedule: ScaleSchedule, block_diagonal: bool, at_once: bool) -> list[tuple[slice, slice, Scales | None]]:
    """For each call its queries, the keys of the image that it is given, and what of these is seen."""
    if at_once:
        return [(slice(None), slice(None), Scales(schedule, block_diagonal))]
    ranges = zip(schedule.starts, schedule.ends, strict=True)
    return [(slice(start, end), slice(start if block_diagonal else 0, end), None) for start, end in ranges]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """With the elements of a head adjacent, as all packages want them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _packed(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, L, ...) -> (B/G, G L, ...): the samples of a group one after the other; a view where the layout allows it."""
    return tensor.reshape(groups, -1, *tensor.shape[2:])


def _unpacked(lse: torch.Tensor, batch: int) -> torch.Tensor:
    """(B/G, H, G L) -> (B, H, L), a view."""
    return lse.unflatten(2, (batch // lse.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def _empty(lengths: torch.Tensor, batch: int) -> torch.Tensor:
    """(B, 1, 1): whose prefix has no valid token."""
    return (lengths <= 0).repeat_interleave(batch // lengths.shape[0], output_size=batch)[:, None, None]


def _per_row(values: torch.Tensor) -> torch.Tensor:
    """(B, H, n) -> (B, n, H, 1)"""
    return values.transpose(1, 2)[..., None]
