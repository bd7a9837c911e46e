"""The command about the installation: what is there."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Info:
    """Show versions, devices and the support matrix; or what a file or a folder is."""

    path: tyro.conf.Positional[Path | None] = None
    """A model, a run, a checkpoint, a file of weights, pictures, a table."""
    markdown: bool = False
    """Print only the support matrix, as the README has it."""

    def run(self) -> None:
        import torch

        import fastvar

        if self.path is not None:
            from fastvar.cli.describe import describe

            for line in describe(self.path):
                print(line)
            return
        from fastvar.tuning import own_summary

        if self.markdown:
            print(fastvar.support().markdown(), end="")
            return
        print(f"fastvar {fastvar.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
        for name in (
            "triton",
            "accelerate",
            "flash-attn",
            "flash-attn-4",
            "xformers",
            "open_clip",
            "timm",
            "transformers",
        ):
            print(f"{name}: {_version(name)}")
        print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        for i in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(i)
            print(f"GPU {i}: {name}, compute {torch.cuda.get_device_capability(i)}")
            print(f"tiles for GPU {i}: {own_summary(name)}")
        if not torch.cuda.device_count():
            print("GPU: none")
        for target in ("cpu", "cuda"):
            print(f"extension {target}: {_extension(target)}")
        print(fastvar.support())


def _extension(target: str) -> str:
    from fastvar import build
    from fastvar.ops import _extension

    note = build.record().get(target, {})
    missing, error = _extension.missing(target), _extension.load_error(target)
    if missing is not None:
        return f"{missing}; {note['reason']}" if note.get("state") == "not built" else missing
    if error is not None:
        return error
    library = _extension.loaded_from(target)
    in_package = library is not None and library.parent == build.PACKAGE
    return f"{library} ({note['reason']})" if in_package and note.get("state") == "built" else str(library)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version({"open_clip": "open_clip_torch"}.get(package, package))
    except metadata.PackageNotFoundError:
        return "not installed"
