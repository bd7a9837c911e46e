"""Counter-based random numbers: a draw depends on its key alone, never on a global state, a worker or the batch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(shift) for shift in (30, 27, 31, 11))


def hash_integers(values: ArrayLike) -> NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) of integers, elementwise."""
    # Copied into at least one dimension: numpy warns of overflow for uint64 scalars but wraps arrays silently.
    x = np.atleast_1d(np.asarray(values)).astype(np.uint64)
    x += _STEP
    x ^= x >> _S30
    x *= _MIX1
    x ^= x >> _S27
    x *= _MIX2
    x ^= x >> _S31
    return x


@lru_cache(maxsize=256)
def _key_state(key: tuple[int, ...]) -> np.uint64:
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = hash_integers(state ^ hash_integers(part & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def uniforms(key: tuple[int, ...], indices: ArrayLike, count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), (B, count) float64: row b is a function of (key, indices[b]) alone.

    key: integers (any sign, 64 bits); indices: (B,) integers.
    """
    rows = hash_integers(np.asarray(indices).astype(np.uint64) ^ _key_state(key))
    counters = np.arange(count, dtype=np.uint64) * _STEP
    return (hash_integers(rows[:, None] + counters[None, :]) >> _S11).astype(np.float64) * 2.0**-53


class Draws:
    """Uniform draws handed out in columns: `take(n)` gives the next (B, n) of each row's `count`."""

    def __init__(self, key: tuple[int, ...], indices: ArrayLike, count: int) -> None:
        # All at once: hashing has a fixed cost that would otherwise dominate single items.
        self._columns = uniforms(key, indices, count)
        self._taken = 0

    def take(self, count: int) -> NDArray[np.float64]:
        start, self._taken = self._taken, self._taken + count
        return self._columns[:, start : self._taken]

    def take_one(self) -> NDArray[np.float64]:
        """The next column alone, (B,)."""
        return self.take(1)[:, 0]
