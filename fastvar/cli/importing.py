"""The command that makes public weights a model of fastvar's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastvar.cli.outputs import output_folder
from fastvar.ranges import OneOf


@dataclass(frozen=True)
class Import:
    """Read the public weights of a VAR or an Infinity and save them as a model that all other commands take."""

    weights: Path
    """The transformer's file, such as var_d16.pth or infinity_2b_reg.pth, or a folder of shards."""
    tokenizer: Path
    """The tokenizer's file, such as vae_ch160v4096z32.pth or infinity_vae_d32reg.pth."""
    output: Path
    """Folder of the model."""
    kind: Annotated[str, OneOf("var", "infinity")] = "var"
    """What it is: "var" or "infinity"."""
    grids: str = ""
    """Infinity: token grids, or a preset such as "infinity-0.25M-1.000"; by default those of 1024 x 1024 pixels."""
    text_encoder: str = ""
    """Infinity: what reads its texts, by a folder or a name; google/flan-t5-xl for the public models."""

    def run(self) -> None:
        from dataclasses import replace

        from fastvar.models import load_infinity, load_var
        from fastvar.schedule import ScaleSchedule

        output_folder("output", self.output)
        if self.kind == "var":
            load_var(self.weights, self.tokenizer)[0].save_pretrained(self.output)
        else:
            net, _ = load_infinity(
                self.weights, self.tokenizer, grids=ScaleSchedule.parse(self.grids) if self.grids else None
            )
            net.config = replace(net.config, text_encoder=self.text_encoder)
            net.save_pretrained(self.output)
        print(f"{self.kind}: {self.output}")
