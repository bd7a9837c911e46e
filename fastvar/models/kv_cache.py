"""The key-value cache of sampling: preallocated, shared by groups and forks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch

from fastvar.ops import PrefixKV


class KVCache:
    """Keys and values of every layer, written scale by scale into memory that is allocated once.

    What all samples of a group share (the subject's prefix) and what all continuations of a sampled state share (the
    trunk) is kept once and only referred to.

    Args:
        layers: number of layers.
        rows: B, batch rows.
        capacity: tokens to make room for.
        heads, head_dim: H and D.
        dtype, device: of keys and values; the model's compute dtype.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        # (layers, B, capacity, H, D) in shape; in memory a head's rows lie together, which is how attention reads them
        self.keys = torch.empty(layers, rows, heads, capacity, head_dim, dtype=dtype, device=device).transpose(2, 3)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.prefix: list[PrefixKV] | None = None
        self.trunk: list[PrefixKV] | None = None

    def layer(
        self, index: int, rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, PrefixKV | None, PrefixKV | None]:
        """A layer's own keys and values (B, capacity, H, D), its prefix and its trunk; of the first `rows` samples, if
        not of all."""
        batch = self.keys.shape[1]
        rows = batch if rows is None else rows

        def first(shared: list[PrefixKV] | None) -> PrefixKV | None:
            if shared is None or rows == batch:
                return None if shared is None else shared[index]
            k, v, lengths = shared[index]
            count = len(k) * rows // batch
            return PrefixKV(k[:count], v[:count], None if lengths is None else lengths[:count])

        return self.keys[index, :rows], self.values[index, :rows], first(self.prefix), first(self.trunk)

    def reserve(self, tokens: int) -> None:
        """Make room for that many tokens of its own; what is there is copied if it has to move."""
        layers, rows, capacity, heads, head_dim = self.keys.shape
        if tokens <= capacity:
            return
        size, kept = (layers, rows, heads, tokens, head_dim), self.length
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.empty(size, dtype=old.dtype, device=old.device).transpose(2, 3)
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)

    def fork(self, times: int) -> KVCache:
        """A cache for `times` continuations of every row: row b of the new one continues row b // times of this one.

        The tokens sampled so far are referred to, not copied; only forking a fork gathers both stretches into one. It
        has no room for more yet, see `reserve`.

        Args:
            times: continuations per row.
        """
        layers, rows, _, heads, head_dim = self.keys.shape
        forked = KVCache(layers, rows * times, 0, heads, head_dim, dtype=self.keys.dtype, device=self.keys.device)
        forked.prefix = self.prefix
        own = [PrefixKV(k[:, : self.length], v[:, : self.length]) for k, v in zip(self.keys, self.values, strict=True)]
        if self.trunk is None:
            forked.trunk = own
        else:
            forked.trunk = [_joined(trunk, tail) for trunk, tail in zip(self.trunk, own, strict=True)]
        return forked

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> KVCache:
        """A cache of `function` of each tensor, of its own keys and values of what is filled."""

        def mapped(shared: PrefixKV) -> PrefixKV:
            return PrefixKV(
                function(shared.k), function(shared.v), None if shared.lengths is None else function(shared.lengths)
            )

        new = copy(self)
        new.keys, new.values = (function(t[:, :, : self.length]) for t in (self.keys, self.values))
        new.prefix = None if self.prefix is None else [mapped(layer) for layer in self.prefix]
        new.trunk = None if self.trunk is None else [mapped(layer) for layer in self.trunk]
        return new

    @property
    def nbytes(self) -> int:
        """Bytes allocated by this cache itself, without what it refers to."""
        return 2 * self.keys.numel() * self.keys.element_size()


def first_tokens(prefix: PrefixKV, count: int) -> PrefixKV:
    """The first `count` tokens of a prefix, not copied."""
    k, v, lengths = prefix
    if count >= k.shape[1]:
        return prefix
    return PrefixKV(k[:, :count], v[:, :count], None if lengths is None else lengths.clamp(max=count))


def _joined(trunk: PrefixKV, tail: PrefixKV) -> PrefixKV:
    times = tail.k.shape[0] // max(trunk.k.shape[0], 1)
    return PrefixKV(
        torch.cat([trunk.k.repeat_interleave(times, 0), tail.k], 1),
        torch.cat([trunk.v.repeat_interleave(times, 0), tail.v], 1),
    )
