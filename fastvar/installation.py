"""How to install an extra: from where fastvar came from, as its name on the package index is another package's."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import unquote, urlparse


def install_command(extra: str) -> str:
    """The command that installs an extra such as "train" of this fastvar."""
    try:
        origin = json.loads(metadata.distribution("fastvar").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    folder = Path(__file__).resolve().parent.parent
    return command_from(extra, folder if (folder / "csrc").is_dir() else None, origin)


def command_from(extra: str, checkout: Path | None, origin: dict[str, Any]) -> str:
    """The command for a checkout, or for the folder, wheel or git URL that fastvar was installed from.

    Args:
        extra: its name.
        checkout: that fastvar runs from, if it does.
        origin: what pip keeps of where a package came from (PEP 610, direct_url.json); empty if nothing is known.
    """
    url = origin.get("url", "")
    if checkout is not None:
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"pip install {editable}{quote(f'{checkout}[{extra}]')}"
    if "vcs_info" in origin:
        at = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
        return f"pip install {quote(f'fastvar[{extra}] @ {at}')}"
    if url.startswith("file:"):  # a folder or a wheel
        return f"pip install {quote(f'{unquote(urlparse(url).path)}[{extra}]')}"
    if url:
        return f"pip install {quote(f'fastvar[{extra}] @ {url}')}"
    return f"pip install '.[{extra}]' in a checkout of fastvar, or the same with a wheel or a git URL"
