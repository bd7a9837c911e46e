"""Is a change faster or slower? Two commits on one machine in one run: `python -m benchmarks.compare BASE HEAD`.

Each commit gets a process of its own with that commit's `fastvar` and this checkout's benchmarks. The two take turns,
a sample each; the table has the ratio of HEAD to BASE with its spread, and says where it lies outside of what two runs
of the same commit differ by. HEAD "." is the working tree as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import fastvar
from benchmarks import records
from benchmarks.cases import setting_name
from benchmarks.runner import Options, Runner
from benchmarks.suites import SUITES


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
    """Exit with 1 where HEAD takes more than this many times as long, beyond its spread."""


def main(arguments: Arguments) -> int:
    size = arguments.size
    if size == "auto":
        size = "gpu" if torch.cuda.is_available() else "cpu"
    cases = [
        (suite.name, {**setting, "size": size}, pass_)
        for suite in SUITES
        if not arguments.suites or suite.name in arguments.suites
        for setting in suite.settings[size]  # type: ignore[index]
        for pass_ in arguments.passes
        if pass_ == "forward" or suite.training
    ]
    slower = 0
    with _worker(arguments.base) as base, _worker(arguments.head) as head:
        for name, setting, pass_ in cases:
            title = f"{name}, {setting_name(setting)}, {pass_}"
            ready = [worker.ask({"suite": name, "setting": setting, "pass": pass_}) for worker in (base, head)]
            sides = zip(("BASE", "HEAD"), ready, strict=True)
            failed = [f"{side}: {answer['error']}" for side, answer in sides if "error" in answer]
            if failed:
                print(f"{title}: {'; '.join(failed)}", flush=True)
                continue
            seconds: dict[str, list[float]] = {"base": [], "head": []}
            for number in range(arguments.rounds):
                order = [("base", base), ("head", head)]
                for side, worker in order if number % 2 else order[::-1]:
                    seconds[side].append(worker.ask({"time": True})["seconds"])
            ratio = records.spread(b / a for a, b in zip(seconds["base"], seconds["head"], strict=True))
            verdict = "same"
            if ratio.low > arguments.slower:
                verdict, slower = "SLOWER", slower + 1
            elif ratio.high < 1 / arguments.slower:
                verdict = "faster"
            times = " -> ".join(f"{1e3 * records.spread(seconds[side]).median:.3f} ms" for side in ("base", "head"))
            print(f"{title}: {times}, {ratio.median:.3f}x ({ratio.low:.3f} to {ratio.high:.3f}) {verdict}", flush=True)
    print(f"{slower} slower")
    return int(slower > 0)


class _Worker:
    """A process that measures one commit."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.compare", "--serve"]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
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
    with tempfile.TemporaryDirectory() as place:
        source = records.ROOT
        if commit != ".":
            source = Path(place) / "source"
            git = ["git", "-C", str(records.ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(source), commit], check=True)
        folder = Path(place) / "run"
        folder.mkdir()
        for name in ("fastvar", "kernels", "csrc"):
            if (source / name).is_dir():
                (folder / name).symlink_to(source / name)
        (folder / "benchmarks").symlink_to(records.ROOT / "benchmarks")
        worker = _Worker(folder)
        try:
            for file in worker.ask({"files": True})["files"]:
                if not Path(file).is_relative_to(source.resolve()):
                    raise RuntimeError(f"compare: expected fastvar of {commit} in {source}, the process took {file}")
            yield worker
        finally:
            worker.process.kill()
            worker.process.wait()
            if commit != ".":
                subprocess.run([*git, "remove", "--force", str(source)], check=True)


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
                device = torch.device("cuda" if question["setting"]["size"] == "gpu" else "cpu")
                runner = runner or Runner(Options(device))
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
