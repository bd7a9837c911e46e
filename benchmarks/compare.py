"""Is a change faster or slower? Two commits on one machine in one run: `python -m benchmarks.compare BASE HEAD`.

Each commit gets a process of its own with that commit's `fastvar` and this checkout's benchmarks, and BASE a second
one, which tells what two runs of one commit differ by. They take turns, a sample each. The table has the ratio of HEAD
to BASE with its spread; a pass is slower where all of the spread lies above that of the second BASE and above `slower`.
HEAD "." is the working tree as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import fastvar
from benchmarks import records
from benchmarks.cases import setting_name
from benchmarks.runner import Options, Runner
from benchmarks.suites import SUITES, cases, device_of, size_of


@dataclass(frozen=True)
class Arguments:
    base: Annotated[str, tyro.conf.Positional]
    """The commit to compare with."""
    head: Annotated[str, tyro.conf.Positional] = "."
    """The commit that is compared; "." for the working tree."""
    size: str = "auto"
    """"tiny", "cpu", "gpu" or "auto"."""
    suites: tuple[str, ...] = ()
    """Names of suites; all by default."""
    passes: tuple[str, ...] = ("forward", "training")
    """Some of forward, backward and training."""
    rounds: int = 9
    """Turns of each."""
    slower: float = 1.05
    """Exit with 1 where HEAD takes more than this many times as long, beyond the spread, or fails and BASE does not."""


def main(arguments: Arguments) -> int:
    slower, broken = 0, 0
    with _worker(arguments.base) as base, _worker(arguments.base) as again, _worker(arguments.head) as head:
        workers = {"base": base, "again": again, "head": head}
        for suite, setting, pass_ in cases(size_of(arguments.size), arguments.suites, arguments.passes):
            title = f"{suite.name}, {setting_name(setting)}, {pass_}"
            question = {"suite": suite.name, "setting": setting, "pass": pass_}
            errors = {side: worker.ask(question).get("error") for side, worker in workers.items()}
            if any(errors.values()):
                broken += errors["base"] is None and errors["head"] is not None
                print(f"{title}: BASE {errors['base'] or 'runs'}; HEAD {errors['head'] or 'runs'}", flush=True)
                continue
            seconds: dict[str, list[float]] = {side: [] for side in workers}
            for number in range(arguments.rounds):
                sides = list(workers)
                for side in sides[number % 3 :] + sides[: number % 3]:
                    seconds[side].append(workers[side].ask({"time": True})["seconds"])
            ratio, noise = (
                records.spread(b / a for a, b in zip(seconds["base"], seconds[side], strict=True))
                for side in ("head", "again")
            )
            verdict = "same"
            if ratio.low > max(arguments.slower, noise.high):
                verdict, slower = "SLOWER", slower + 1
            elif ratio.high < min(1 / arguments.slower, noise.low):
                verdict = "faster"
            times = " -> ".join(f"{1e3 * records.spread(seconds[side]).median:.3f} ms" for side in ("base", "head"))
            shown = [f"{r.median:.3f}x ({r.low:.3f} to {r.high:.3f})" for r in (ratio, noise)]
            print(f"{title}: {times}, {shown[0]}, BASE again {shown[1]}: {verdict}", flush=True)
    print(f"{slower} slower, {broken} broken")
    return int(slower + broken > 0)


class _Worker:
    """A process that measures one commit."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.compare", "--serve"]
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        # threads that wait must not spin into the samples of the others
        environment = {"GOMP_SPINCOUNT": "2000", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"compare: the process of one commit ended with {self.process.wait()}")
        return json.loads(answer)


@contextmanager
def _worker(commit: str) -> Iterator[_Worker]:
    """A worker in a folder that has the commit's package and this checkout's benchmarks."""
    git = ["git", "-C", str(records.ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        source = records.ROOT
        if commit != ".":
            source = Path(place) / "source"
            stack.callback(subprocess.run, [*git, "prune"], check=True)
            stack.callback(shutil.rmtree, source, ignore_errors=True)
            subprocess.run([*git, "add", "--quiet", "--detach", str(source), commit], check=True)
        folder = Path(place) / "run"
        folder.mkdir()
        for name in ("fastvar", "kernels", "csrc"):
            if (source / name).is_dir():
                (folder / name).symlink_to(source / name)
        (folder / "benchmarks").symlink_to(records.ROOT / "benchmarks")
        worker = _Worker(folder)
        stack.callback(worker.process.wait)
        stack.callback(worker.process.kill)
        for file in worker.ask({"files": True})["files"]:
            if not Path(file).is_relative_to(source.resolve()):
                raise RuntimeError(f"compare: expected fastvar of {commit} in {source}, the process took {file}")
        yield worker


def _serve() -> None:
    """Answer questions on standard input: prepare a pass, then time one sample of it after another."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    runner: Runner | None = None
    sample = None
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        if "files" in question:
            modules = (fastvar, importlib.import_module("fastvar.kernels.adaptive_layer_norm.reference"))
            answer["files"] = [os.path.realpath(str(module.__file__)) for module in modules]
        elif "time" in question:
            assert sample is not None
            answer["seconds"] = sample()
        else:
            try:
                runner = runner or Runner(Options(device_of(question["setting"]["size"])))
                suite = next(suite for suite in SUITES if suite.name == question["suite"])
                sample = runner.stopwatch(suite, question["setting"], question["pass"])
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    else:
        sys.exit(main(tyro.cli(Arguments)))
