"""The command that runs another one with stand-ins for attention packages that are not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Shim:
    """Run a command, `fastvar shim flash_attn -- python their_script.py`, in which imports of a package that is not
    installed find a stand-in made of PyTorch's own attention. An installed one is used as it is."""

    package: tyro.conf.Positional[Literal["flash_attn", "xformers", "hart_backend"]]
    """The package."""
    command: tyro.conf.Positional[tuple[str, ...]]
    """The command, after --."""

    def run(self) -> None:
        import os
        import subprocess

        from fastvar.integrations import shims

        if not self.command:
            raise ValueError("shim: command: expected one after --, got none")
        with shims.startup(self.package) as folder:
            places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
            raise SystemExit(subprocess.run(self.command, env=environment).returncode)
