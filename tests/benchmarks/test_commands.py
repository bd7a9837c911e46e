"""What a stranger runs: the benchmarks under pytest, the script for a GPU, the comparison of two commits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # pytest-xdist tells its workers' children about itself, and pytest-benchmark then measures nothing
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env={**ours, **environment})


def dry(tmp_path: Path, *arguments: str, warmers: int) -> subprocess.CompletedProcess[str]:
    (tmp_path / "temporary").mkdir(exist_ok=True)
    environment = {"OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path / "temporary"), "PYTHON": sys.executable}
    environment |= {"WARMERS": str(warmers), "WORKERS": "0"}  # processes that would collect all tests once more
    return run("bash", "benchmarks/on_gpu.sh", "--dry", *arguments, **environment)


@pytest.mark.slow
def test_script_for_a_gpu(tmp_path: Path) -> None:
    """All of it that needs no device: every suite at its tiny size, the table last."""
    done = dry(tmp_path, "800", warmers=0)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/suites.jsonl").read_text().splitlines()]
    from benchmarks.suites import SUITES

    assert {row["suite"] for row in rows} == {suite.name for suite in SUITES}
    assert all(row["wrong"] == {} for row in rows)
    table = done.stdout[done.stdout.index("suite, setting ") :].splitlines()
    assert len(table) == min(len(rows) + 1, 40) + 1  # and a line about tuning
    assert done.stdout.index("tests: done") < done.stdout.index("sanitize: left out") < done.stdout.index("bench: done")
    assert "tune: left out, no device" in done.stdout


@pytest.mark.slow
def test_script_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part alone; what has a row is left out, and a pass that hangs takes no other along."""
    few = ("bench", "400", "--", "--suites", "adaptive_layer_norm,gated_residual")
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = dry(tmp_path, *few, "-p", "hangs", warmers=2)
    assert done.returncode == 0 and "bench: a pass ended the process (142)" in done.stdout, done.stdout + done.stderr
    rows = tmp_path / "out/suites.jsonl"
    first = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {(row["suite"], row["pass"]) for row in first} == {
        ("adaptive_layer_norm", "forward"),
        ("gated_residual", "forward"),
        ("gated_residual", "training"),
    }
    compiled = (tmp_path / "temporary/fastvar_compiled.jsonl").read_text().splitlines()
    assert len(compiled) == len({line for line in compiled}) == 4  # each once, though it runs in two processes
    (tmp_path / "out/suites.tries.jsonl").unlink()
    done = dry(tmp_path, *few, warmers=0)
    assert done.returncode == 0, done.stdout + done.stderr
    second = [json.loads(line) for line in rows.read_text().splitlines()]
    assert second[:3] == first
    assert [(row["suite"], row["pass"]) for row in second[3:]] == [("adaptive_layer_norm", "training")]


HANGS = """
import signal
from benchmarks.runner import Runner
measure = Runner.measure
def hang(self, suite, setting, pass_):
    if suite.name == "adaptive_layer_norm" and pass_ == "training":
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 60  # the limit of a pass
        signal.raise_signal(signal.SIGALRM)  # it is over
    return measure(self, suite, setting, pass_)
Runner.measure = hang
"""


def test_script_for_a_gpu_needs_one(tmp_path: Path) -> None:
    code = "import sys, torch; sys.exit(torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        pytest.skip("there is a GPU")
    done = run("bash", "benchmarks/on_gpu.sh", OUT=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 1 and "expected a CUDA device" in done.stderr
    done = run("bash", "benchmarks/on_gpu.sh", "soon", OUT=str(tmp_path))
    assert done.returncode == 2 and "expected tests, sanitize, bench, tune, profile or a number" in done.stderr


def test_pytest_benchmark_shows_every_contender(tmp_path: Path) -> None:
    arguments = [
        "--suites",
        "adaptive_layer_norm",
        "--size",
        "tiny",
        "--seconds",
        "0.01",
        "--rows",
        str(tmp_path / "rows"),
    ]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    report = tmp_path / "report.json"
    done = run(*command, *arguments, "--benchmark-json", str(report))
    assert done.returncode == 0, done.stdout
    row = json.loads((tmp_path / "rows").read_text().splitlines()[0])
    found = {entry["name"]: entry for entry in json.loads(report.read_text())["benchmarks"]}
    ours = found["test_suite[adaptive_layer_norm, tiny, batch 2, float32, forward: fastvar]"]
    assert ours["stats"]["median"] == pytest.approx(row["contenders"]["fastvar"]["seconds"]["median"])
    assert ours["stats"]["rounds"] == row["rounds"] and ours["group"].endswith("float32, forward")
    assert "left out at size tiny" in row["missing"]["torch.compile"]
    done = run(*command, "--suites", "beauty")
    assert done.returncode != 0 and "expected some of block_causal_attention" in done.stdout + done.stderr


@pytest.mark.slow
def test_comparison_of_two_commits() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    options = ["--size", "tiny", "--suites", "adaptive_layer_norm", "--passes", "forward", "--rounds", "3"]
    done = run(sys.executable, "-m", "benchmarks.compare", "HEAD", ".", *options, "--slower", "50")
    assert done.returncode == 0, done.stderr
    assert "adaptive_layer_norm, tiny, batch 2, float32, forward: " in done.stdout and "0 broken" in done.stdout


def test_instructions_need_the_extension_and_valgrind(tmp_path: Path) -> None:
    """Counting takes minutes; here is what can go wrong before."""
    command = [sys.executable, "-m", "benchmarks.instructions", "--rows", str(tmp_path / "rows")]
    done = run(*command, "--suites", "generate", PATH=f"{tmp_path}:/usr/bin:/bin")
    message = "expected valgrind on the PATH" if shutil.which("valgrind") is None else "expected some of"
    assert done.returncode == 2 and message in done.stderr
    (tmp_path / "counted").write_text("events: Ir\nfn=(1) f\n3 4\ntotals: 1234\n")
    from benchmarks.instructions import total

    assert total(tmp_path / "counted") == 1234
