"""Which passes come first where time is short, and which are there already."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import order, records, summary
from benchmarks.suites import cases


@pytest.fixture
def gpu_cases() -> list[order.Case]:
    return list(cases("gpu"))


def test_the_most_important_come_first(gpu_cases: list[order.Case]) -> None:
    found = order.by_priority(gpu_cases)
    assert sorted(map(str, found)) == sorted(map(str, gpu_cases))
    for name, asked in order.ORDER:  # a setting that nobody has any more would move nothing to the front
        assert any(suite.name == name and asked.items() <= setting.items() for suite, setting, _ in gpu_cases), name
    assert found[0][0].name == order.ORDER[0][0]
    keys = [(suite.name, str(setting)) for suite, setting, _ in found]
    changes = 1 + sum(a != b for a, b in pairwise(keys))
    assert changes == len(set(keys))  # the passes of a setting follow each other: its problem is built once
    listed = sum(any(s.name == n and a.items() <= setting.items() for n, a in order.ORDER) for s, setting, _ in found)
    firsts = {suite.name: dict(suite.settings["gpu"][0]) for suite, _, _ in gpu_cases}
    rest = [{k: v for k, v in setting.items() if k != "size"} == firsts[s.name] for s, setting, _ in found[listed:]]
    assert rest.index(False) == sum(rest)  # every suite's first setting before anyone's second


def test_shares_are_all(gpu_cases: list[order.Case]) -> None:
    parts = [order.share(gpu_cases, part, 3) for part in range(3)]
    assert sorted(str(case) for part in parts for case in part) == sorted(map(str, gpu_cases))
    assert max(map(len, parts)) < len(gpu_cases) / 2
    assert order.part_of("") is None and order.part_of("1/1") == (0, 1) and order.part_of("3/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="expected I/N"):
            order.part_of(text)


def test_what_is_there_is_left_out(
    gpu_cases: list[order.Case], row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "sources", lambda: "abc")
    monkeypatch.setattr(records, "commit", lambda _: "0123456789abcdef")
    rows = tmp_path / "rows.jsonl"

    def journal(device: str = "NVIDIA H200", **options: Any) -> order.Journal:
        return order.Journal(rows, device, **options)

    suite, setting, pass_ = gpu_cases[3]
    assert journal().open(gpu_cases) == gpu_cases
    for changes in ({"device": "NVIDIA H100"}, {"sources": "of another tree"}, {"commit": "of another one"}):
        here = {"device": "NVIDIA H200", "sources": "abc", "setting": dict(setting)} | changes
        records.append(rows, row(suite.name, pass_, **here))
    assert journal().open(gpu_cases) == gpu_cases
    records.append(rows, row(suite.name, pass_, device="NVIDIA H200", sources="abc", setting=dict(setting)))
    rest = gpu_cases[:3] + gpu_cases[4:]
    assert journal().open(gpu_cases) == rest and journal("NVIDIA B200").open(gpu_cases) == gpu_cases

    suite, setting, pass_ = gpu_cases[0]
    journal().start(suite.name, setting, pass_)
    journal().fail(suite.name, setting, pass_, "ValueError: no")
    assert journal().open(gpu_cases) == rest  # it may have been cut off: once more
    journal().start(suite.name, setting, pass_)
    assert journal().open(gpu_cases) == rest[1:]
    assert records.read(tmp_path / "rows.tries.jsonl")[1]["error"] == "ValueError: no"

    monkeypatch.setattr(order, "gettempdir", lambda: str(tmp_path))
    journal(compiling=True).start(suite.name, setting, pass_)
    assert journal(compiling=True).open(gpu_cases) == rest[1:] and len(records.read(journal().tries)) == 3


def test_a_line_that_was_cut_off(
    gpu_cases: list[order.Case],
    row: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a full disk, say: it is left out aloud, and what comes next is a line of its own."""
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(order, "sources", lambda: "abc")
    monkeypatch.setattr(records, "commit", lambda _: "0123456789abcdef")
    journal = order.Journal(rows, "NVIDIA H200")
    suite, setting, pass_ = gpu_cases[0]
    for path in (rows, journal.tries):
        records.append(path, {"device": "another"})
        path.write_text(path.read_text() + '{"device": "NVIDIA H200", "sui')
    records.append(rows, row(suite.name, pass_, device="NVIDIA H200", sources="abc", setting=dict(setting)))
    suite, setting, pass_ = gpu_cases[1]
    for _ in range(order.TRIES):
        journal.start(suite.name, setting, pass_)
    assert journal.open(gpu_cases) == gpu_cases[2:]
    said = capsys.readouterr().err
    assert f"{rows}:2: expected a record in JSON, got b'{{" in said and f"{journal.tries}:2: " in said
    monkeypatch.setattr(sys, "argv", ["summary", "--rows", str(rows)])
    rows.write_text("\n".join(rows.read_text().splitlines()[1:]))
    assert summary.main() == 0 and f"{rows}:1: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"^{rows}:1: expected a record in JSON"):
        records.read(rows)


def test_sources_are_those_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("fastvar/a.py", "csrc/b.cu", "benchmarks/checkouts/VAR/c.py", "docs/d.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("1")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    hashes = []
    for place in ("", "benchmarks/checkouts/VAR/c.py", "docs/d.py", "csrc/b.cu", "fastvar/a.py"):
        if place:
            (tmp_path / place).write_text("2")
        order.sources.cache_clear()
        hashes.append(order.sources())
    order.sources.cache_clear()
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes)) == 3
