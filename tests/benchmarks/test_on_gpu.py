"""The script for a GPU: who gets how much time, and what it says of a part that fails or is cut off.

No part runs: `timeout`, through which all of them are called, is a stand-in.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs the script, each command of which does what `does` says and is a line of `calls`, after its seconds."""
    for name in ("python", "nsys", "compute-sanitizer", "timeout"):
        text = f'echo "$3 ${{*:4}}" >>{tmp_path}/calls\neval "$DOES"' if name == "timeout" else ""
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, does: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python"), "DOES": does}
        environment |= {
            "OUT": str(tmp_path / "out"),
            "TMPDIR": str(tmp_path),
            "CUDA_HOME": str(tmp_path),
            "WARMERS": "0",
        }
        command = ["bash", "benchmarks/on_gpu.sh", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)

    return run


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("", {"tests": 2333, "sanitize": 1400, "bench": 6000, "tune": 7000}),
        ("tune bench", {"bench": 6000, "tune": 7000}),
        ("bench tune profile", {"bench": 5300, "tune": 6300, "profile": 7000}),
        ("profile bench tests", {"tests": 2333, "bench": 6300, "profile": 7000}),
        ("bench", {"bench": 7000}),
    ],
)
def test_shares(script: Script, tmp_path: Path, parts: str, expected: dict[str, int]) -> None:
    """Of 7000 seconds, of which no part takes any: in order, and none takes what another one needs."""
    script(*parts.split(), "7000")
    marks = {"nsys profile": "profile", "pytest tests -m": "tests", "memcheck": "sanitize"}
    marks |= {"pytest benchmarks": "bench", "fastvar tune": "tune", "fastvar build": "build"}
    found = {}
    for line in (tmp_path / "calls").read_text().splitlines():
        found[next(part for mark, part in marks.items() if mark in line)] = int(line.split()[0])
    found.pop("build", None)  # where there is nvcc
    assert list(found) == list(expected)
    assert all(seconds - 60 < found[name] <= seconds for name, seconds in expected.items()), found


@pytest.mark.parametrize(
    ("log", "failures"),
    [
        ("tests/a.py::test_a PASSED [ 12%]\n========= ERROR SUMMARY: 0 errors", ""),
        (
            "[gw1] [  4%] FAILED tests/a.py::test_a \n[gw0] [ 12%] PASSED tests/a.py::test_b",
            "FAILED tests/a.py::test_a",
        ),
        ("tests/a.py::test_a ERROR [ 12%]", "test_a ERROR"),
        ("a PASSED [ 12%]\n========= Invalid __global__ read of size 4 bytes", "Invalid __global__ read of size 4"),
        ("a PASSED [ 12%]\n========= ERROR SUMMARY: 10 errors", "ERROR SUMMARY: 10 errors"),
    ],
)
def test_what_is_cut_off_hides_no_failure(script: Script, log: str, failures: str) -> None:
    done = script("--dry", "tests", "600", does=f"printf '{log.replace('%', '%%')}\n'; exit 124")
    assert "tests: cut off after " in done.stdout and " s at [ 12%]" in done.stdout, done.stdout
    assert done.returncode == bool(failures) == ("tests: FAILED before that:" in done.stdout), done.stdout
    assert failures in done.stdout.partition("before that:")[2]


def test_what_is_killed_before_its_time_failed(script: Script) -> None:
    done = script("--dry", "tests", "600", does="exit 137")
    assert done.returncode == 1 and "tests: FAILED with 137" in done.stdout


@pytest.mark.parametrize(("begun", "starts"), [("", 2), ("[ $(wc -l <{calls}) -gt 3 ] || echo {{}} >>{tries}; ", 5)])
def test_a_process_that_ends_before_its_first_pass(script: Script, tmp_path: Path, begun: str, starts: int) -> None:
    """It is started twice; one that gets on is started again until it does not."""
    places = {"calls": tmp_path / "calls", "tries": tmp_path / "out/suites.tries.jsonl"}
    done = script("--dry", "bench", "20", does=f"{begun.format(**places)}exit 139")
    assert len((tmp_path / "calls").read_text().splitlines()) == starts, done.stdout
    assert "bench: given up" in done.stdout and "bench: FAILED with 139" in done.stdout and done.returncode == 1
