"""Tile sizes of kernels: a table for each kernel, its rows measured on a card or derived from what a card has.

A row says for which calls it is: a family of cards, and upper bounds on numbers such as a head dimension or a length.
The first row that fits a call and the card's shared memory is taken. Rows of the user's own, which `fastvar tune`
measured on this very card, come before those of the package. A choice depends on nothing else: with the same tables the
same call gives the same bits. Kernels that only add up or merge what others made have fixed blocks, beside their
launches.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

Tile = Mapping[str, int]  # a kernel's block sizes, num_warps and num_stages
LENGTHS = ("length", "queries", "cells")  # numbers of a call that may be smaller than where a tile was measured
Key = Mapping[str, int]  # what a call is: bits of an element, head_dim, length and the like

# Shared memory that a block may have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED = {"sm80": 163 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10}
_FAMILIES = {80: "sm80", 86: "sm89", 87: "sm80", 89: "sm89", 90: "sm90", 100: "sm100", 103: "sm100"}


def cdiv(size: int, block: int) -> int:
    """So many blocks cover a size. triton.cdiv is made for kernels and slow on the host."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not below a size."""
    return 1 << max(size - 1, 0).bit_length()


class Card(NamedTuple):
    """A GPU, as far as tables look at it.

    Attributes:
        name: as the driver gives it; the user's own rows are for a name.
        family: "sm80" (A100), "sm89" (RTX 30 and 40), "sm90" (H100, H200), "sm100" (B200), "sm120" (RTX 50).
        shared: bytes of shared memory that a block may have.
    """

    name: str
    family: str
    shared: int


# What is assumed where there is no GPU: kernels are interpreted, or compiled for one that is not there.
NO_CARD = Card("", "sm90", SHARED["sm90"])


@cache
def card(device: torch.device) -> Card:
    """The card of a device; `NO_CARD` for a CPU and where there is no driver."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return NO_CARD
    family = family_of(torch.cuda.get_device_capability(device))
    # an older card than the first of its family may have less
    own = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED[family])
    return Card(torch.cuda.get_device_name(device), family, min(own, SHARED[family]))


def family_of(capability: tuple[int, int]) -> str:
    """The family of a compute capability; of one that is not known, of the last one before it."""
    number = 10 * capability[0] + capability[1]
    if number >= 110:  # consumer cards again
        return "sm120"
    return _FAMILIES[max((known for known in _FAMILIES if known <= number), default=80)]


@dataclass(frozen=True)
class Row:
    """A tile and the calls that it is for.

    Attributes:
        tile: block sizes, num_warps and num_stages.
        family: of cards; None for all.
        most: upper bounds on the call's numbers; what is not named may be anything.
        source: where it was measured; empty for what was derived.
    """

    tile: Tile
    family: str | None = None
    most: Key = field(default_factory=dict)
    source: str = ""

    def fits(self, family: str, key: Key) -> bool:
        return self.family in (None, family) and all(key[name] <= bound for name, bound in self.most.items())

    def fits_as_measured(self, key: Key) -> bool:
        """Whether a row of the user's own is for a call: no other head dimension or dtype, but shorter rows too."""
        return all(
            key[name] <= number if name in LENGTHS else key[name] == number for name, number in self.most.items()
        )


TABLES: dict[str, Table] = {}


class Table:
    """The tiles of one kernel.

    Args:
        name: "<op>.<kernel>".
        rows: tried in order. The last ones have no family and get smaller and smaller, so that one fits any card.
        shared: bytes of shared memory that a tile takes in a call.
        candidates: values of the tile that `fastvar tune` tries, all combinations that fit; empty for a kernel that is
            not tuned.

    Attributes:
        asked: called with the numbers of every call, while tuning; None otherwise.
        forced: the tile of calls with the numbers `forced_for`, or of all, while tuning; None otherwise.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        *,
        shared: Callable[[Tile, Key], int] = lambda tile, key: 0,
        candidates: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.name, self.rows, self.shared, self.candidates = name, tuple(rows), shared, dict(candidates or {})
        self._choose = lru_cache(maxsize=None)(self._chosen)
        self.asked: Callable[[Key], None] | None = None
        self.forced: Tile | None = None
        self.forced_for: Key | None = None
        TABLES[name] = self

    @property
    def version(self) -> str:
        """Changes with the rows and candidates: rows that were measured against others are not taken."""
        return hashlib.sha256(repr((self.rows, self.candidates)).encode()).hexdigest()[:12]

    def choose(self, card: Card, **key: int) -> dict[str, int]:
        """The tile for a call on a card.

        Raises:
            ValueError: no row fits, or the user's own rows cannot be read.
        """
        if self.asked is not None:
            self.asked(key)
        if self.forced is not None and self.forced_for in (None, key):
            return dict(self.forced)
        return dict(self._choose(card, tuple(key.items())))

    def packaged(self, card: Card, key: Key) -> Tile:
        """The tile without the user's own rows.

        Raises:
            ValueError: no row fits.
        """
        return self._first(self.rows, card, key)

    def _chosen(self, card: Card, items: tuple[tuple[str, int], ...]) -> Tile:
        own = own_tiles(card.name).rows(self.name, self.version)
        key = dict(items)
        return self._first((*(row for row in own if row.fits_as_measured(key)), *self.rows), card, key)

    def _first(self, rows: Sequence[Row], card: Card, key: Key) -> Tile:
        for row in rows:
            if row.fits(card.family, key) and self.shared(row.tile, key) <= card.shared:
                return row.tile
        raise ValueError(f"{self.name}: no tile fits {dict(key)} on {card}")

    def clear(self) -> None:
        """Forget what was chosen, as after a change of the user's own rows."""
        self._choose.cache_clear()


@dataclass(frozen=True)
class OwnTiles:
    """What `fastvar tune` measured on a card.

    Attributes:
        card: its name.
        date: of the last measurement, UTC.
        triton: the version that compiled the kernels.
        kernels: for each table its `version` and the rows.
        path: the file.
    """

    card: str = ""
    date: str = ""
    triton: str | None = None
    kernels: Mapping[str, tuple[str, tuple[Row, ...]]] = field(default_factory=dict)
    path: Path | None = None

    def rows(self, kernel: str, version: str) -> tuple[Row, ...]:
        """Those of a kernel; none, and a warning, if they were measured with other tables or another triton."""
        of, rows = self.kernels.get(kernel, (version, ()))
        if rows and (of != version or self.triton != triton_version()):
            what = f"for other tables of {kernel}" if of != version else f"with triton {self.triton}"
            warnings.warn(f"tiles: {self.path} was measured {what} and is left out: run fastvar tune", stacklevel=4)
            return ()
        return rows


def own_path(name: str) -> Path:
    """Where the user's own rows for a card lie: tiles/<card>.json in the cache folder ($XDG_CACHE_HOME/fastvar, by
    default ~/.cache/fastvar)."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = chosen if chosen.is_absolute() else Path.home() / ".cache"
    return folder / "fastvar" / "tiles" / f"{name.replace(' ', '-').replace('/', '-')}.json"


@cache
def own_tiles(name: str) -> OwnTiles:
    """The user's own rows for a card; read once.

    Raises:
        ValueError: a file that is no such table.
    """
    try:
        path = own_path(name)
        text = path.read_bytes() if name and path.is_file() else b""
    except (OSError, RuntimeError):  # no home, or not this user's: nothing was tuned
        text = b""
    if not text:
        return OwnTiles()
    try:
        given: dict[str, Any] = json.loads(text)
        kernels = {
            kernel: (
                str(table["version"]),
                tuple(
                    Row(_numbers(row["tile"]), None, _numbers(row["most"]), str(row["source"])) for row in table["rows"]
                ),
            )
            for kernel, table in given["kernels"].items()
        }
        return OwnTiles(str(given["card"]), str(given["date"]), given["triton"], kernels, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"tiles: {path}: expected a table that fastvar tune wrote (delete it), got {error!r}"
        ) from None


def _numbers(given: Any) -> dict[str, int]:
    if not all(type(value) is int for value in given.values()):
        raise TypeError(f"expected integers, got {given}")
    return dict(given)


@cache
def triton_version() -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
