"""Instructions of the operators in C++: `python -m benchmarks.instructions`. A busy machine does not move them.

Callgrind (from valgrind, which has to be installed) runs the first CPU setting of each suite forward, once and on one
thread, and counts what runs inside the extension. It knows no AVX-512: what is counted is the code for AVX2. Takes a
minute or so for each suite and two more to import torch; rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import records
from benchmarks.cases import OURS, Setting, Suite
from benchmarks.report import INSTRUCTIONS
from benchmarks.suites import SUITES, cases
from fastvar import explain

ENTRY = "torch::stable::detail::boxer<*"  # what torch calls of the extension


def in_extension() -> list[str]:
    """The suites of operators that the extension has, none where it is not built."""
    explain("residual_quantize", torch.zeros(1))  # loads it
    return [suite.name for suite in SUITES if hasattr(torch.ops.fastvar_cpu, suite.name)]


def count(names: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The suites' rows, counted by the callgrind under which this runs."""
    for suite, setting, _ in cases("cpu", names, ("forward",), "first"):
        before, with_call = (_counted(suite, setting, folder, call) for call in (False, True))
        if with_call == before:
            raise RuntimeError(f"instructions: {suite.name}: nothing of the extension ran")
        yield {"suite": suite.name, "setting": dict(setting), "instructions": with_call - before}


def _counted(suite: Suite, setting: Setting, folder: Path, call: bool) -> int:
    """The instructions of a process of its own, which builds a problem and perhaps calls our contender."""
    child = os.fork()
    if not child:
        try:
            _run(suite, setting, call)
            os._exit(0)
        except Exception:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"instructions: {suite.name}: the process that was to be counted ended with {status}")
    return total(folder / f"counted.{child}")


def _run(suite: Suite, setting: Setting, call: bool) -> None:
    torch.manual_seed(0)
    problem = suite.build(setting, torch.device("cpu"))
    ours = problem.contenders[OURS]
    if call and not isinstance(ours, str):
        with torch.no_grad():
            ours(**problem.inputs)


def total(path: Path) -> int:
    """The total in a file of callgrind."""
    return int(next(line for line in path.read_text().splitlines() if line.startswith("totals:")).split()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(in_extension()), help="of operators in C++; all by default")
    parser.add_argument("--rows", type=Path, default=INSTRUCTIONS, help="file to append to")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of callgrind's files: this runs under it
    options = parser.parse_args(arguments)
    names = options.suites.split(",")
    if options.folder:
        for row in count(names, options.folder):
            print(json.dumps(row), flush=True)
        return
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        parser.error("expected valgrind on the PATH")
    unknown = sorted(set(names) - set(in_extension()))
    if unknown:
        parser.error(f"--suites: expected some of {in_extension()}, as far as the extension is built, got {unknown}")
    with TemporaryDirectory() as folder:
        command = [valgrind, "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/counted.%p"]
        command += [f"--toggle-collect={ENTRY}", sys.executable, "-m", "benchmarks.instructions"]
        command += ["--suites", options.suites, "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, cwd=records.ROOT, stdout=subprocess.PIPE, text=True
        ) as counting:
            assert counting.stdout is not None
            for line in counting.stdout:
                row = json.loads(line)
                print(f"{row['suite']}: {row['instructions']:,}", flush=True)
                records.append(options.rows, {"benchmark": "instructions", **row, **records.provenance()})
    if counting.returncode:
        sys.exit(counting.returncode)


if __name__ == "__main__":
    main()
