"""Block-causal attention a scale at a time, by attention that knows no mask: PyTorch's own, flash-attn, xFormers.

Each scale's queries see one rectangle of keys. The samples of a group attend to their shared prefix in one call, as the
rows of one sample, so that it is read once a group and never copied; its part and that of a scale's own keys are merged
by their log-sum-exp. The backward pass is the package's, called with the merged result and log-sum-exp: the gradient of
a part depends on the other parts through these two alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.ops.block_causal_attention import AttentionCall


class Scales(NamedTuple):
    """Queries and keys of all scales in one call."""

    schedule: ScaleSchedule
    block_diagonal: bool


Seen = torch.Tensor | Scales | None


class Part(NamedTuple):
    """Attention of q (B, n, H, D) over keys and values (B, m, H, D): over all of them, with lengths (B,) over the first
    of them, at least one, or as `Scales` has it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    seen: Seen

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v


class Package(Protocol):
    """Attention by a package. lse (B, H, n) is in float32 (float64 for float64), contiguous."""

    name: str
    takes_lengths: bool

    @property
    def takes_scales(self) -> tuple[int, int]:
        """The largest head dimensions for which it is called once for all scales, forward and for the gradient."""

    def attend(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the result (B, n, H, D) and lse."""

    def gradients(
        self, part: Part, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, in memory of their own. out and lse may be those of more keys than k."""


class ByScale:
    """`forward` and `backward` of an implementation that calls a package for each scale."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def forward(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """See the reference.

        Raises:
            ValueError: a prefix of several lengths that the package does not take.
        """
        prefix, scale = call.prefix, call.softmax_scale
        lengths = None if prefix is None else prefix.lengths
        if lengths is not None and not self.package.takes_lengths:
            raise ValueError(
                f"block_causal_attention: prefix.lengths: expected none for backend={self.package.name!r}, got one"
            )
        batch, length, heads, width = call.q.shape
        out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        lse = out.new_empty(batch, heads, length, dtype=torch.promote_types(call.q.dtype, torch.float32))
        if not call.q.numel():
            return out, lse
        q, k, v = _plain(call.q), _plain(call.k), _plain(call.v)
        other = None
        if prefix is not None and prefix.k.shape[1]:
            groups = prefix.k.shape[0]
            other, other_lse = self.package.attend(
                Part(_packed(q, groups), _plain(prefix.k), _plain(prefix.v), scale, lengths)
            )
            other, other_lse = other.reshape(q.shape), _unpacked(other_lse, batch)
            if lengths is not None:
                other_lse = other_lse.masked_fill(_empty(lengths, batch), -torch.inf)
        # the largest first: while it runs, the host asks for the others
        for rows, keys, seen in reversed(_parts(call, width <= self.package.takes_scales[0])):
            part, part_lse = self.package.attend(Part(q[:, rows], k[:, keys], v[:, keys], scale, seen))
            if other is None:
                out[:, rows], lse[:, :, rows] = part, part_lse
                continue
            total = torch.logaddexp(part_lse, other_lse[:, :, rows])
            ours, theirs = (_per_row((lse - total).exp()) for lse in (part_lse, other_lse[:, :, rows]))
            out[:, rows] = torch.addcmul(part * ours, other[:, rows], theirs)  # in float32, rounded once
            lse[:, :, rows] = total
        return out, lse

    def backward(
        self, call: AttentionCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
    ) -> dict[str, torch.Tensor]:
        """Gradients of q, k, v and of the prefix's keys and values; saved: the results."""
        (out, lse), (grad, grad_lse) = saved, grads
        prefix, scale, batch = call.prefix, call.softmax_scale, call.q.shape[0]
        given = {"q": call.q, "k": call.k, "v": call.v}
        if prefix is not None:
            given |= {"prefix_k": prefix.k, "prefix_v": prefix.v}
        if not call.q.numel():
            return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in given.items()}
        q, k, v = _plain(call.q), _plain(call.k), _plain(call.v)
        g = torch.zeros_like(out) if grad is None else _plain(grad.to(q.dtype))
        dq = prefix_dk = prefix_dv = None
        if prefix is not None:
            prefix_dk, prefix_dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (prefix.k, prefix.v))
            if prefix.k.shape[1]:
                groups = prefix.k.shape[0]
                some_lse = lse
                if prefix.lengths is not None:  # infinite: the keys of an empty prefix had no weight
                    some_lse = lse.masked_fill(_empty(prefix.lengths, batch), torch.inf)
                dq, prefix_dk, prefix_dv = self._gradients(
                    Part(_packed(q, groups), _plain(prefix.k), _plain(prefix.v), scale, prefix.lengths),
                    _packed(g, groups),
                    _packed(out, groups),
                    _packed(some_lse.transpose(1, 2), groups).transpose(1, 2).contiguous(),
                    None if grad_lse is None else _packed(grad_lse.transpose(1, 2), groups).transpose(1, 2),
                )
                dq = dq.reshape(q.shape).contiguous()
        add_q = dq is not None
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq
        # the last scale comes first: it sees all keys, and the gradients of the others are added to its own at the end
        parts = _parts(call, q.shape[-1] <= self.package.takes_scales[1])
        of_last = of_others = None
        if call.block_diagonal and len(parts) > 1:
            of_last = tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        for rows, keys, seen in reversed(parts):
            part_q, *of_keys = self._gradients(
                Part(q[:, rows], k[:, keys], v[:, keys], scale, seen),
                g[:, rows],
                out[:, rows],
                lse[:, :, rows].contiguous(),
                None if grad_lse is None else grad_lse[:, :, rows],
            )
            if add_q:
                dq[:, rows] += part_q
            else:
                dq[:, rows] = part_q
            if of_last is None:
                of_last = tuple(part.contiguous() for part in of_keys)
            elif call.block_diagonal:
                for whole, part in zip(of_last, of_keys, strict=True):
                    whole[:, keys] = part
            elif of_others is None:  # these see fewer keys: sums in float32, rounded once, are of those alone
                wide = torch.promote_types(q.dtype, torch.float32)
                of_others = tuple(part.to(wide) for part in of_keys)
            else:
                for whole, part in zip(of_others, of_keys, strict=True):
                    whole[:, keys] += part
            del part_q, of_keys  # before the next call, which has as much of its own
        assert of_last is not None
        for whole, others in zip(of_last, of_others or (), strict=False):
            whole[:, : others.shape[1]] += others
        dk, dv = of_last
        gradients = zip(given, (dq, dk, dv, prefix_dk, prefix_dv), strict=False)
        return {name: t.contiguous() for name, t in gradients if t is not None}

    def _gradients(
        self, part: Part, g: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, slopes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The package's, and what `slopes` (B, H, n), the gradient of the log-sum-exp, adds.

        Its gradient by the scores are the weights: q gets the weighted sum of keys, which is attention with the keys as
        values, and k the weighted sum of queries, which is the gradient of these values."""
        dq, dk, dv = self.package.gradients(part, g, out, lse)
        if slopes is not None:
            steep = _per_row(slopes * part.scale)
            of_keys = part._replace(v=part.k)
            mean, mean_lse = self.package.attend(of_keys)
            share = _per_row((mean_lse - lse).exp())  # of all keys that the row sees, those here
            weighted = (part.q * steep).to(part.q.dtype)
            dq = (dq + mean * (steep * share)).to(dq.dtype)
            dk = dk + self.package.gradients(of_keys, weighted, out, lse)[2]
        return dq, dk, dv


def _parts(call: AttentionCall, at_once: bool) -> list[tuple[slice, slice, Scales | None]]:
    """For each call its queries, the keys of the image that it is given, and what of these is seen."""
    if at_once:
        return [(slice(None), slice(None), Scales(call.schedule, call.block_diagonal))]
    ranges = zip(call.schedule.starts, call.schedule.ends, strict=True)
    return [(slice(start, end), slice(start if call.block_diagonal else 0, end), None) for start, end in ranges]


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
