"""Tuning: which tile is chosen, what is written and read again; with a kernel and a clock that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvar.kernels.common import tiling
from fastvar.kernels.common.tiling import Card, Row, Table, own_path, own_tiles

from fastvar.tuning import Tuner, _forced, add_own_row, load_tables, own_summary
from fastvar.workloads import Shape, tensors, workloads

CARD = Card("NVIDIA Test/1", "sm90", 1000)
DEFAULT = {"BLOCK": 32, "num_warps": 4}


class Kernel:
    """A kernel that takes as long as its table of seconds says, and on which some tiles fail."""

    def __init__(self, **candidates: Any) -> None:
        self.table = Table(
            "toy.forward",
            [Row({"BLOCK": 64, "num_warps": 4}, "sm80"), Row(DEFAULT, most={"length": 4096})],
            shared=lambda tile, key: tile["BLOCK"] * key["bits"] // 8,
            candidates=candidates or {"BLOCK": (16, 32, 64, 128, 512), "num_warps": (4, 8)},
        )
        self.seconds: dict[tuple[int, int], float] = {}
        self.broken: dict[tuple[int, int], Any] = {}
        self.ran: list[tuple[int, int]] = []
        self.now = 0.0

    def call(self, length: int) -> Any:
        def run() -> torch.Tensor:
            tile = self.table.choose(CARD, bits=16, length=length)
            self.ran.append((tile["BLOCK"], tile["num_warps"]))
            found = self.broken.get(self.ran[-1], torch.ones(3))
            if isinstance(found, Exception):
                raise found
            return found

        return run

    def measure(self, call: Any) -> float:
        call()
        self.now += 1
        return self.seconds.get(self.ran[-1], 1.0)

    def tuner(self, seconds: float = float("inf")) -> tuple[Tuner, list[str]]:
        lines: list[str] = []
        return Tuner(CARD, self.measure, seconds, lines.append, lambda: self.now), lines


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder and tables of the test's own."""
    load_tables()  # so that none of the package's registers itself among them
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiling, "TABLES", {})
    monkeypatch.setattr("fastvar.tuning.TABLES", tiling.TABLES)
    own_tiles.cache_clear()
    yield tmp_path
    own_tiles.cache_clear()


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_a_tile_forced_within_another(kernel: Kernel) -> None:
    table, key = kernel.table, {"length": 1}
    with _forced(table, {"BLOCK": 64}, key):
        with _forced(table, {"BLOCK": 128}, key):
            assert table.forced == {"BLOCK": 128}
        assert table.forced == {"BLOCK": 64} and table.forced_for == key
    assert table.forced is None and table.forced_for is None


def test_the_fastest_right_tile_is_written_and_taken(kernel: Kernel, cache: Path) -> None:
    kernel.seconds = {(16, 4): 0.9, (64, 8): 0.5, (128, 4): 0.1, (128, 8): 0.2, (64, 4): 0.3}
    kernel.broken = {
        (128, 4): torch.full((3,), 1.1),  # wrong
        (128, 8): torch.full((3,), float("nan")),
        (64, 4): RuntimeError("out of resource: registers"),
    }
    tuner, lines = kernel.tuner()
    assert tuner.run([("short", lambda: kernel.call(100)), ("again", lambda: kernel.call(100))]) == 1
    (line,) = lines
    assert line.startswith("toy.forward, short, bits 16, length 100: 1000.000 ms, 7 of 7 tiles tried; ")
    assert line.endswith("; 2.00 times as fast with BLOCK 64, num_warps 8")
    assert (512, 4) not in kernel.ran  # more than the card's shared memory
    assert kernel.table.forced is None and kernel.table.asked is None
    assert kernel.table.choose(CARD, bits=16, length=99) == {"BLOCK": 64, "num_warps": 8}
    assert kernel.table.choose(CARD, bits=16, length=101) == DEFAULT
    assert kernel.table.choose(CARD, bits=32, length=99) == DEFAULT  # of other elements nothing was measured
    assert kernel.table.choose(CARD._replace(name="NVIDIA Other"), bits=16, length=99) == DEFAULT
    path = cache / "fastvar/tiles/NVIDIA-Test-1.json"
    assert path == own_path(CARD.name) and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]  # nothing half written
    found = json.loads(path.read_text())
    assert found["card"] == CARD.name and found["kernels"]["toy.forward"]["rows"][0]["most"] == {
        "bits": 16,
        "length": 100,
    }
    assert "1 rows for 1 kernels, of NVIDIA Test/1, 20" in own_summary(CARD.name) and str(path) in own_summary(
        CARD.name
    )


def test_noise_changes_nothing(kernel: Kernel) -> None:
    kernel.seconds = {(16, 4): 0.98}
    tuner, lines = kernel.tuner()
    assert tuner.run([("short", lambda: kernel.call(100))]) == 1  # known for later: the package's is the best
    assert lines[0].endswith("the package's is kept")
    assert kernel.table.choose(CARD, bits=16, length=100) == DEFAULT


def test_rows_of_shorter_calls_come_first(kernel: Kernel) -> None:
    kernel.seconds = {(64, 8): 0.5}
    tuner, _ = kernel.tuner()
    assert tuner.run([("long", lambda: kernel.call(1000))]) == 1
    kernel.seconds = {(16, 8): 0.5}
    assert tuner.run([("short", lambda: kernel.call(100))]) == 1  # what was there stays
    chosen = [kernel.table.choose(CARD, bits=16, length=length)["BLOCK"] for length in (100, 101, 1000, 1001)]
    assert chosen == [16, 64, 64, 32]
    kernel.seconds = {(128, 8): 0.5}
    tuner.run([("short", lambda: kernel.call(100))])  # the package's tile is what it is compared with again
    assert kernel.table.choose(CARD, bits=16, length=100)["BLOCK"] == 128
    assert len(own_tiles(CARD.name).kernels["toy.forward"][1]) == 2


def test_calls_with_other_numbers_keep_their_tile(kernel: Kernel) -> None:
    """An operator that asks once a scale: each has a row of its own."""
    ran: list[tuple[int, int]] = []

    def scales() -> torch.Tensor:
        for length in (1, 10):
            ran.append((length, kernel.table.choose(CARD, bits=16, length=length)["BLOCK"]))
        return torch.ones(3)

    def measure(call: Any) -> float:
        call()
        (_, first), (_, second) = ran[-2:]
        return 1.0 - 0.2 * (first == 16) - 0.2 * (second == 128)

    tuner = Tuner(CARD, measure, report=lambda line: None)
    assert tuner.run([("scales", lambda: scales)]) == 2
    assert (64, 64) not in {(a[1], b[1]) for a, b in zip(ran[::2], ran[1::2], strict=True)}  # never forced on both
    chosen = [kernel.table.choose(CARD, bits=16, length=length)["BLOCK"] for length in (1, 2, 10, 11)]
    assert chosen == [16, 128, 128, 32]


def test_time_is_shared(kernel: Kernel) -> None:
    other = Table("toy.other", [Row(DEFAULT)], candidates={"num_warps": (1, 2, 8)})

    def both() -> Any:
        other.choose(CARD, width=3)
        return kernel.call(100)()

    tuner, lines = kernel.tuner(seconds=8.0)
    tuner.run([("first", lambda: both), ("second", lambda: kernel.call(200)), ("third", lambda: kernel.call(300))])
    assert kernel.now < 30 and len(lines) == 4
    assert lines[0].startswith("toy.other, first, width 3: ")
    assert lines[-1] == "third: no time left"
    near = sorted(kernel.table.candidates["BLOCK"])  # those that differ in one value from the package's come first
    assert near and kernel.ran[1] == (32, 4)


def test_a_broken_device_is_no_slow_tile(kernel: Kernel) -> None:
    def broken() -> Any:
        if any(ran == (16, 4) for ran in kernel.ran):
            raise RuntimeError("illegal memory access")
        return kernel.call(100)()

    tuner, _ = kernel.tuner()
    with pytest.raises(RuntimeError, match=r"tune: toy.forward: a candidate broke the device: illegal memory access"):
        tuner.run([("short", lambda: broken)])
    assert not own_path(CARD.name).exists()


def test_a_workload_that_cannot_run_is_left_out(kernel: Kernel) -> None:
    def build() -> Any:
        raise RuntimeError("out of memory")

    tuner, lines = kernel.tuner()
    assert tuner.run([("large", build), ("short", lambda: kernel.call(100))]) == 1
    assert lines[0] == "large: left out: out of memory"


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_a_workload_that_takes_too_much_memory_is_left_out(kernel: Kernel, runs: int) -> None:
    """The second time it runs, beside the results to compare with, or as what is left after a candidate failed."""
    ran: list[tuple[int, int]] = []
    kernel.broken = {(16, 4): torch.OutOfMemoryError("no memory for a candidate")}

    def large() -> Any:
        found = kernel.call(200)()
        ran.append(kernel.ran[-1])
        if len(ran) > runs:
            raise torch.OutOfMemoryError("no memory")
        return found

    tuner, lines = kernel.tuner()
    assert tuner.run([("large", lambda: large), ("short", lambda: kernel.call(100))]) == 1
    assert lines[0] == "large: left out: no memory" and lines[1].startswith("toy.forward, short, ")
    assert ran == [(32, 4)] * min(runs + 1, 4) + ran[4:], "the package's tile"
    assert kernel.table.forced is None and kernel.table.choose(CARD, bits=16, length=200) == DEFAULT


def test_what_a_candidate_leaves_behind_is_freed(kernel: Kernel) -> None:
    """Before the package's tile runs again: its memory may be what that one needs."""
    held: list[weakref.ref[torch.Tensor]] = []

    def call() -> torch.Tensor:
        assert not held or held[-1]() is None
        found = torch.ones(3)
        if kernel.table.choose(CARD, bits=16, length=100)["BLOCK"] == 16:
            held.append(weakref.ref(found))
            raise torch.OutOfMemoryError("no memory")
        return kernel.call(100)()

    tuner, lines = kernel.tuner()
    assert tuner.run([("short", lambda: call)]) == 1 and held, lines


def test_a_stale_file_is_left_out_aloud(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row({"BLOCK": 64, "num_warps": 8}, None, {"length": 100}, "here")
    add_own_row(CARD, kernel.table, row)
    assert kernel.table.choose(CARD, bits=16, length=7)["BLOCK"] == 64
    changed = Kernel(BLOCK=(32, 64))
    with pytest.warns(
        UserWarning, match=r"NVIDIA-Test-1.json was measured for other tables of toy.forward .* fastvar tune"
    ):
        assert changed.table.choose(CARD, bits=16, length=7) == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a call of these numbers
        assert changed.table.choose(CARD, bits=16, length=7) == DEFAULT
    assert "0 rows for 0 kernels" in own_summary(CARD.name) and "left out: toy.forward" in own_summary(CARD.name)
    kernel = Kernel()
    monkeypatch.setattr(tiling, "triton_version", lambda: "99.0")
    with pytest.warns(UserWarning, match="was measured with triton"):
        assert kernel.table.choose(CARD, bits=16, length=7) == DEFAULT


@pytest.mark.parametrize(
    "text", ["{", "[]", "\udcff", '{"kernels": {"toy.forward": {"version": "a", "rows": [{"tile": {"BLOCK": "a"}}]}}}']
)
def test_a_broken_file_is_named(kernel: Kernel, text: str) -> None:
    path = own_path(CARD.name)
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogateescape")  # the third is no UTF-8
    with pytest.raises(ValueError, match=r"NVIDIA-Test-1.json: expected a table that fastvar tune wrote \(delete it\)"):
        kernel.table.choose(CARD, bits=16, length=7)
    assert "delete it" in own_summary(CARD.name)
    add_own_row(CARD, kernel.table, Row({"BLOCK": 64, "num_warps": 8}, None, {"length": 100}, "here"))  # as tune does
    assert kernel.table.choose(CARD, bits=16, length=7)["BLOCK"] == 64


def test_without_a_file_nothing_changes(kernel: Kernel, cache: Path) -> None:
    assert kernel.table.choose(CARD, bits=16, length=7) == DEFAULT
    assert own_summary(CARD.name) == "the package's; fastvar tune measures this card" and not list(cache.iterdir())


def test_workloads_run() -> None:
    """Each at a tiny size, with the reference: the operators take what they are given."""
    shapes = (Shape("tiny", "1,2,3", 2, 2, 16, vocab_size=32), Shape("turned", "1,2,3", 2, 2, 16, rope=True))
    names = [workload.name for workload in workloads(shapes)]
    assert len({(w.op, w.name) for w in workloads(shapes)}) == len(names)
    for workload in workloads(shapes):
        call = workload.build(torch.device("cpu"), torch.float32, "reference")
        found, again = tensors(call()), tensors(call())
        assert found and all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), workload.name
        gradients = len(found) > 1 and "training" in workload.name
        assert gradients or "training" not in workload.name
    with torch.device("meta"):
        assert len(workloads()) > len(names) / 2


def test_tables_are_found() -> None:
    code = "from fastvar.tuning import load_tables; print(*load_tables(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    root = Path(__file__).resolve().parents[1] / "kernels"
    assert {line.split(".")[0] for line in done.stdout.split()} >= {
        path.parent.name for path in root.glob("*/tiles.py") if path.parent.name != "common"
    }


def test_the_command_needs_a_gpu() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "fastvar", "tune", *arguments], capture_output=True, text=True)

    done = run("--ops", "beauty")
    assert done.returncode == 2 and "tune: ops: expected some of block_causal_attention, " in done.stderr
    done = run("--minutes", "0")
    assert done.returncode == 2 and "Tune: minutes: expected above 0, got 0.0" in done.stderr
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2 and done.stderr == "fastvar: tune: needs a CUDA device, torch sees none\n"
