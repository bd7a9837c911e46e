"""The command line `fastvar`: thin commands over the library, every option documented in --help."""

from __future__ import annotations

import signal
import sys
from typing import Any

import tyro

import fastvar
import fastvar.threads  # before torch comes
from fastvar.cli.build import Build
from fastvar.cli.demo import Demo
from fastvar.cli.info import Info
from fastvar.cli.models import Sample, Train, TrainTokenizer
from fastvar.cli.reinforcement import RL, Ablate, ChooseMiddle, Evaluate
from fastvar.cli.tune import Tune
from fastvar.installation import install_command
from fastvar.ranges import check_fields


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake ends in one line on standard error and exit status 2."""
    commands: dict[str, Any] = {
        "train-tokenizer": TrainTokenizer,
        "train": Train,
        "sample": Sample,
        "evaluate": Evaluate,
        "rl": RL,
        "choose-middle": ChooseMiddle,
        "ablate": Ablate,
        "demo": Demo,
        "info": Info,
        "build": Build,
        "tune": Tune,
    }
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"fastvar {fastvar.__version__}")
        return
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="fastvar",
        description="Visual autoregressive models: train, sample, evaluate, learn from rewards. "
        "fastvar --version prints the version.",
        args=arguments,
    )
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
