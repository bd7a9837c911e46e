"""The command line `fastvar`: thin commands over the library, every option documented in --help."""

from __future__ import annotations

import signal
import sys
from pkgutil import resolve_name
from typing import Any

import tyro

import fastvar
import fastvar.threads  # before torch comes
from fastvar.installation import install_command
from fastvar.ranges import check_fields

# By import path: only the command that is called is imported, and some of them need much.
COMMANDS = {
    "train-tokenizer": "fastvar.cli.models:TrainTokenizer",
    "train": "fastvar.cli.models:Train",
    "encode-text": "fastvar.cli.texts:EncodeText",
    "sample": "fastvar.cli.models:Sample",
    "evaluate": "fastvar.cli.reinforcement:Evaluate",
    "latency": "fastvar.cli.latency:Latency",
    "rl": "fastvar.cli.reinforcement:RL",
    "choose-middle": "fastvar.cli.reinforcement:ChooseMiddle",
    "ablate": "fastvar.cli.reinforcement:Ablate",
    "demo": "fastvar.cli.demo:Demo",
    "recipe": "fastvar.cli.recipe:RunRecipe",
    "import": "fastvar.cli.importing:Import",
    "info": "fastvar.cli.info:Info",
    "shim": "fastvar.cli.shim:Shim",
    "build": "fastvar.cli.build:Build",
    "tune": "fastvar.cli.tune:Tune",
}


def command_of(given: list[str]) -> Any:
    """What arguments ask for, as the object whose `run()` does it; a mistake in them ends with exit status 2."""
    called = given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS
    return tyro.extras.subcommand_cli_from_dict(
        {name: resolve_name(COMMANDS[name]) for name in called},
        prog="fastvar",
        description="Visual autoregressive models: train, sample, evaluate, learn from rewards. "
        "fastvar --version prints the version.",
        args=given,
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake ends in one line on standard error and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"fastvar {fastvar.__version__}")
        return
    command = command_of(given)
    try:
        check_fields(command)
        command.run()
    except KeyboardInterrupt as error:  # a run that has saved says where, and by which signal it was stopped
        print(f"fastvar: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_status", 128 + signal.SIGINT)) from None
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else f"; {install_command('train')}"
        print(f"fastvar: {error}{remedy}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastvar: {error}", file=sys.stderr)
        raise SystemExit(2) from None
