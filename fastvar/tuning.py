"""Measures which tiles of our kernels are fastest on a card: `fastvar tune`.

A workload is a call of a public operator at a model's size (`fastvar.workloads`). Run once, it tells which tables of
tiles it asks and with which numbers; then each candidate of each table takes its turn in that same call. What is found
goes to a file that `fastvar.kernels.common.tiling` reads before the package's own rows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from statistics import median

import torch

from fastvar.files import write_json
from fastvar.kernels.common.tiling import (
    TABLES,
    Card,
    Key,
    OwnTiles,
    Row,
    Table,
    Tile,
    own_path,
    own_tiles,
    triton_version,
)
from fastvar.ops._triton import triton_modules
from fastvar.workloads import Call, tensors

NOISE = 1.03  # a tile has to be this many times as fast as the package's


def load_tables() -> Mapping[str, Table]:
    """All tables of the package; none where Triton is not installed."""
    triton_modules()  # each registers its tables
    return TABLES


@dataclass
class Tuner:
    """Finds tiles and writes them.

    Attributes:
        card: whose tiles.
        measure: seconds of a call.
        seconds: to spend at most; what is being compiled is finished.
        report: called with a line for each table and setting.
        clock: for the time that is spent.
    """

    card: Card
    measure: Callable[[Call], float]
    seconds: float = math.inf
    report: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic

    def run(self, calls: Sequence[tuple[str, Callable[[], Call]]]) -> int:
        """Tune all tables that the calls ask, each under a name; the number of rows that were written.

        Raises:
            RuntimeError: the package's own tile fails, as after a candidate that broke the device.
        """
        end, done, written = self.clock() + self.seconds, set(), 0
        for number, (name, build) in enumerate(calls):
            if self.clock() >= end:
                self.report(f"{name}: no time left")
                continue
            try:
                call = build()
                jobs = [job for job in self._asked(call) if (job[0].name, str(job[1])) not in done]
            except Exception as error:  # too little memory, say
                self.report(f"{name}: left out: {error}")
                continue
            # what one leaves over is the others'
            until = self.clock() + (end - self.clock()) / (len(calls) - number)
            for place, (table, key) in enumerate(jobs):
                share = (until - self.clock()) / (len(jobs) - place)
                try:
                    row = self._fastest(name, table, key, call, self.clock() + share)
                except torch.OutOfMemoryError as error:  # tuning keeps results to compare with, besides the call's own
                    self.report(f"{name}: left out: {error}")
                    break
                done.add((table.name, str(key)))
                if row is not None:
                    add_own_row(self.card, table, row)
                    written += 1
        return written

    def _asked(self, call: Call) -> list[tuple[Table, Key]]:
        """The tables that a call asks, with the numbers that it asks each one with."""
        asked: dict[str, tuple[Table, Key]] = {}

        def recorder(table: Table) -> Callable[[Key], None]:
            def record(key: Key) -> None:
                asked.setdefault(f"{table.name} {key}", (table, key))

            return record

        tunable = [table for table in load_tables().values() if table.candidates]
        for table in tunable:
            table.asked = recorder(table)
        try:
            call()
        finally:
            for table in tunable:
                table.asked = None
        return list(asked.values())

    def _fastest(self, name: str, table: Table, key: Key, call: Call, end: float) -> Row | None:
        """The row of a call's numbers: the fastest tile, the package's unless another one is faster by more than noise.
        None where there was no time to try one."""
        packaged = table.packaged(self.card, key)
        with _forced(table, packaged, key):
            expected = tensors(call())
            before = self.measure(call)
        seconds: dict[int, float] = {}
        candidates = list(self._candidates(table, packaged, key))
        tried = 0
        for number, tile in enumerate(candidates):
            if self.clock() >= end:
                break
            tried += 1
            failed = False
            with _forced(table, tile, key):
                try:
                    if _same(tensors(call()), expected):
                        seconds[number] = self.measure(call)
                except Exception:  # too many registers or too much shared memory, or a compiler that gives up
                    failed = True
            if failed:  # the exception, and what it holds of the device's memory, is gone
                self._still_works(table, packaged, key, call)
        title = f"{table.name}, {name}, {_text(key)}"
        if not tried:
            self.report(f"{title}: no time left")
            return None
        best, gain = packaged, 1.0
        if seconds:
            number = min(seconds, key=lambda number: seconds[number])
            gain = self._gain(table, packaged, candidates[number], key, call)
            if gain > NOISE:
                best = candidates[number]
        words = f"{before * 1e3:.3f} ms, {tried} of {len(candidates)} tiles tried"
        words += f"; {gain:.2f} times as fast with {_text(best)}" if best is not packaged else "; the package's is kept"
        self.report(f"{title}: {words}")
        source = f"fastvar tune, {self.card.name}, {_today()[:10]}, {name}"
        return Row(dict(best), None, dict(key), source)

    def _candidates(self, table: Table, packaged: Tile, key: Key) -> Iterator[Tile]:
        """All combinations that fit, those first that differ least from the package's."""
        names = list(table.candidates)
        tiles = [
            {**packaged, **dict(zip(names, values, strict=True))} for values in product(*table.candidates.values())
        ]
        fitting = [tile for tile in tiles if tile != packaged and table.shared(tile, key) <= self.card.shared]
        yield from sorted(fitting, key=lambda tile: sum(tile[name] != packaged[name] for name in names))

    def _gain(self, table: Table, packaged: Tile, best: Tile, key: Key, call: Call) -> float:
        """How many times as fast, in turns, so that both meet the same clock and temperature."""
        ratios = []
        for _ in range(5):
            with _forced(table, packaged, key):
                theirs = self.measure(call)
            with _forced(table, best, key):
                ratios.append(theirs / self.measure(call))
        return median(ratios)

    def _still_works(self, table: Table, packaged: Tile, key: Key, call: Call) -> None:
        with _forced(table, packaged, key):
            try:
                call()
            except torch.OutOfMemoryError:  # which is no broken device
                raise
            except Exception as error:
                raise RuntimeError(f"tune: {table.name}: a candidate broke the device: {error}") from error


class DeviceClock:
    """Seconds that a call's kernels take: the median of several, each with a cold L2 cache and without the host's
    share, as the device is kept busy until all of them are queued."""

    def __init__(self, device: torch.device) -> None:
        self._filler = torch.empty(256 << 20, dtype=torch.int8, device=device)
        self._filler.zero_()
        self._filling = self._timed(self._filler.zero_)

    def __call__(self, call: Call) -> float:
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        expected = time.perf_counter() - begin
        fills = max(1, math.ceil(1.5 * queued / self._filling))
        rounds = min(max(int(0.1 / (expected + fills * self._filling)), 5), 25)
        return median(self._timed(call, fills) for _ in range(rounds))

    def _timed(self, call: Call, fills: int = 0) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(fills):
            self._filler.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def add_own_row(card: Card, table: Table, row: Row) -> None:
    """Write a row of the user's own for a card, in place of one for the same numbers. It is taken from now on."""
    try:
        known = own_tiles(card.name)
    except ValueError:  # broken; this is its remedy
        known = OwnTiles()
    kernels = dict(known.kernels) if known.triton == triton_version() else {}
    version, rows = kernels.get(table.name, (table.version, ()))
    rows = tuple(other for other in rows if other.most != row.most and version == table.version)
    # a row holds for all smaller numbers, so the smallest come first
    kernels[table.name] = table.version, tuple(sorted((*rows, row), key=lambda row: sorted(row.most.items())))
    write_json(
        own_path(card.name),
        {
            "card": card.name,
            "date": _today(),
            "triton": triton_version(),
            "kernels": {
                name: {
                    "version": version,
                    "rows": [{"tile": dict(r.tile), "most": dict(r.most), "source": r.source} for r in rows],
                }
                for name, (version, rows) in kernels.items()
            },
        },
    )
    own_tiles.cache_clear()
    for each in TABLES.values():
        each.clear()


def own_summary(name: str) -> str:
    """What `fastvar info` says of a card's own tiles."""
    try:
        own = own_tiles(name)
    except ValueError as error:
        return str(error)
    if own.path is None:
        return "the package's; fastvar tune measures this card"
    tables = load_tables()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = {
            kernel: len(own.rows(kernel, tables[kernel].version if kernel in tables else "")) for kernel in own.kernels
        }
    text = f"{sum(taken.values())} rows for {sum(map(bool, taken.values()))} kernels, of {own.card}, {own.date}"
    stale = [kernel for kernel, rows in taken.items() if not rows]
    left_out = f"; left out: {', '.join(stale)}, measured for other tables or with triton {own.triton}" if stale else ""
    return f"{own.path}: {text}{left_out}"


@contextmanager
def _forced(table: Table, tile: Tile, key: Key) -> Iterator[None]:
    """Calls with these numbers take this tile."""
    before = table.forced, table.forced_for
    table.forced, table.forced_for = tile, key
    try:
        yield
    finally:
        table.forced, table.forced_for = before


def _same(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether integers are equal and floats differ by rounding only, relative to the largest."""
    for a, b in zip(results, expected, strict=True):
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif b.numel():
            error = (a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp_min(1e-30)
            if not error.item() <= (0.02 if b.dtype.itemsize == 2 else 1e-3):  # NaN is not
                return False
    return True


def _text(tile: Tile) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile.items())


def _today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
