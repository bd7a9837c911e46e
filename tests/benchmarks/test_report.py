"""Tables and plots are made of the rows alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cases import Suite
from benchmarks.records import append, read
from benchmarks.summary import lines

ROOT = Path(__file__).resolve().parents[2]


def test_tables(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = row("attention", ours=9.0)
    rows = [old, row("attention"), row("attention", "training", ours=1e-6, rival=2.0), row("loss", rival=1e-3)]
    rows += [row("removed"), row("loss", device="another CPU")]

    def asked(size: str, passes: Any) -> Any:
        return [(Suite(n, {}, (), None), rows[0]["setting"], p) for n in ("attention", "loss") for p in passes]  # type: ignore[arg-type]

    monkeypatch.setattr(report, "cases", asked)
    newest = report.newest(rows, "cpu", "a CPU")
    assert [(r["suite"], r["pass"]) for r in newest] == [
        *[("attention", p) for p in ("forward", "training")],
        ("loss", "forward"),
    ]
    assert old not in newest and report.newest(rows, "cpu") == rows[-1:]
    assert report.devices(rows, "cpu") == ["a CPU", "another CPU"] and report.devices(rows, "gpu") == []
    text = report.tables(newest)
    assert "| VAR-d16, batch 2, float32: forward | 2 ms, 50 % of the roofline, 10 MiB |" in text
    assert "| 1.50x (1.35 to 1.65), 25 MiB |" in text and "| 1 µs, 50 %" in text and "removed" not in text
    assert "| 2 ms (reference), 50 %" in report.tables([row("policy_loss")])  # an operator, which has backends
    assert "Not measured: flash-attn: flash_attn is not installed; sloppy: wrong, error 0.5, limit 1e-05." in text
    summary = report.summary(newest)
    assert "| loss | 0 | 0 | 1 | 0.50x |" in summary and "| attention | 2 | 0 | 0 | 1.50x to 2000000.00x |" in summary
    even = row("loss")
    even["ratios"]["eager"] |= {"low": 0.9, "high": 1.6}  # an interval that contains 1 is no win
    assert "| loss | 0 | 1 | 0 | 1.50x |" in report.summary([even])
    conditions = report.conditions(newest)
    assert "caches L1 48K, L2 2048K, " in report.conditions([row("loss", caches="L1 48K, L2 2048K")])
    assert "a CPU, 2 threads on 2 cores, torch 2.14.1, triton 3.8.0, Python 3.11.7, commit 0123456" in conditions
    assert "2026-11-21; 5 to 5 rounds, load 0.1 to 0.1." in conditions
    assert "commit unknown" in report.conditions([row("loss", commit=None)])
    assert report.plot(newest).width > 500


def test_a_loss_as_a_graph_shows(row: Any) -> None:
    one = row("quantiser")
    for name, seconds in (("fastvar", 1.4e-3), ("eager", 0.7e-3)):
        one["contenders"][name]["graph_seconds"] = {"median": seconds, "low": seconds, "high": seconds}
    assert "| quantiser | 0 | 0 | 1 | 0.50x to 1.50x |" in report.summary([one])
    assert "2 ms, 1.4 ms as a graph, 50 % of the roofline" in report.tables([one])


def test_times() -> None:
    times = {1.5: "1.5 s", 0.99996: "1 s", 0.9994: "999 ms", 9.999e-4: "1 ms", 2.34e-5: "23.4 µs"}
    assert {seconds: report._time(seconds) for seconds in times} == times


def test_each_device_has_its_own_table(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    setting = {"model": "VAR-d16", "batch": 64, "dtype": "bfloat16", "size": "gpu"}
    rows = [row("policy_loss", setting=setting, device=cards[i], ours=(4e-3, 2e-3)[i]) for i in (0, 1)]
    monkeypatch.setattr(report, "cases", lambda *_, **__: [(Suite("policy_loss", {}, (), None), setting, "forward")])  # type: ignore[arg-type]
    readme, page = report.texts(ROOT, rows).values()
    assert "| NVIDIA H100 80GB HBM3 (0123456) | 0 | 0 | 1 | `policy_loss` |" in readme
    assert "| NVIDIA H200 (0123456) | 1 | 0 | 0 | none |" in readme
    tables = page.split("\nNVIDIA ")[1:]  # of the summary, then in full
    assert [table.splitlines()[0] for table in tables] == ["H100 80GB HBM3:", "H200:"] * 2
    for i in (0, 2):
        assert "0.75x" in tables[i] and "1.50x" not in tables[i] and "Measured on NVIDIA H100 80GB HBM3, " in tables[i]
        assert "1.50x" in tables[i + 1] and "0.75x" not in tables[i + 1] and "on NVIDIA H200, " in tables[i + 1]
    found = "\n".join(lines(rows, 40))
    assert found.index("NVIDIA H200, commit 0123456:") > found.index("NVIDIA H100 80GB HBM3, commit 0123456:")


def test_changes_of_a_tree_are_said(row: Any) -> None:
    changed = row("policy_loss", dirty=True, changes="auto takes all")
    assert "commit 0123456 with changes (auto takes all), " in report.conditions([changed])
    assert "commit 0123456 with changes, " in report.conditions([row("policy_loss", dirty=True)])


def test_tuned_tiles_are_said(row: Any) -> None:
    tuned = row("policy_loss", tuned="2026-11-27T12:00:00+00:00")
    assert "tiles that fastvar tune chose on 2026-11-27, " in report.conditions([tuned])
    assert "tiles" not in report.conditions([row("policy_loss"), row("policy_loss", tuned=None)])


def test_host_times(row: Any) -> None:
    times = {"launches": 3, "us": 41.6, "by_triton_us": 80.2, "pass": "training"}
    old, new = ({**row("gate"), **times, "us": us} for us in (99.0, 41.6))
    (line,) = report.host_times([old, new]).splitlines()[2:]
    assert line.startswith("| gate | training | 3 | 42 | 80 | ")
    assert report.host_times([]) == "No rows yet.\n"


def test_instructions(row: Any) -> None:
    old, new = ({**row("search"), "instructions": count} for count in (7, 1234567))
    text = report.instructions([old, new, {**new, "suite": "masks"}])
    assert text.splitlines()[2:] == [
        f"| {name} | VAR-d16, batch 2, float32 | 1,234,567 | 0123456 |" for name in ("search", "masks")
    ]
    assert report.instructions([]) == "No rows yet.\n"


def test_losses_come_first(row: Any) -> None:
    rows = [row("good"), row("bad", rival=1e-3), row("fair", rival=2e-3)]
    assert [line.split(",")[0] for line in lines(rows, 40)[2:]] == ["bad", "fair", "good"]
    assert len(lines([row(f"suite {i}") for i in range(100)], 40)) == 1 + 40
    old = [row("bad", rival=1e-6), row("bad", rival=1e-6, commit="older")]
    assert lines([*old, *rows], 40) == lines(rows, 40)  # the newest of the newest commit
    mixed = [row("here"), row("there", device="another")]  # a table each
    assert [line.split(",")[0] for line in lines(mixed, 40)] == [
        "a CPU",
        "suite",
        "here",
        "another",
        "suite",
        "there",
    ]


def test_text_between_markers() -> None:
    text = "a\n<!-- here -->\nold\n<!-- end of here -->\nb\n"
    assert report.between(text, "here", "new\n") == "a\n<!-- here -->\nnew\n<!-- end of here -->\nb\n"
    with pytest.raises(ValueError, match="expected <!-- there -->"):
        report.between(text, "there", "")


def test_documents_are_those_of_the_rows() -> None:
    rows = read(report.ROWS)
    for path, text in report.texts(ROOT, rows).items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.report"
    assert all(row.get("changes") for row in rows if row["dirty"])  # else nobody knows what was measured


def test_short_table(row: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.summary", "--rows", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no rows in" in done.stderr
    for name in ("one", "two"):
        append(tmp_path / "rows.jsonl", row(name))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "two" in done.stdout and "one" in done.stdout
