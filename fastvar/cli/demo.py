"""The command that shows all of fastvar on handwriting."""

from __future__ import annotations

from dataclasses import dataclass

from fastvar.cli.common import train_on
from fastvar.cli.outputs import output_folder, say
from fastvar.handwriting.demo import DemoConfig, run_demo
from fastvar.handwriting.infinity_demo import INFINITY_REPORT, infinity_headline, run_infinity_demo
from fastvar.handwriting.report import headline


@dataclass(frozen=True)
class Demo(DemoConfig):
    """Train a tokenizer and a VAR on real handwriting, with and without a reference subject, or a small Infinity; write
    a report."""

    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPUs, if there are any."""

    def run(self) -> None:
        output_folder("output", self.output)
        train_on(self.device)
        if self.model == "infinity":
            for name, figure in infinity_headline(run_infinity_demo(self)):
                say(f"{name}: {figure}")
            say(f"report: {self.output / INFINITY_REPORT}")
            return
        results = run_demo(self)
        for name, figure in headline(results):
            say(f"{name}: {figure}")
        say(f"report: {self.output / 'report.html'}")
