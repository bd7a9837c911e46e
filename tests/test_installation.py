"""How an extra is installed: never by fastvar's name on the package index, which is another package's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import fastvar
from fastvar.cli import main
from fastvar.cli.build import Build
from fastvar.installation import command_from, install_command

ROOT = Path(__file__).resolve().parent.parent
COMMIT = {"vcs": "git", "commit_id": "abc123"}
STRANGER = Version("1.0")  # of the same name on the index


@pytest.mark.parametrize(
    ("checkout", "origin", "command"),
    [
        (Path("/src/fastvar"), {}, "pip install '/src/fastvar[lora]'"),
        (
            Path("/src/fastvar"),
            {"url": "file:///src/fastvar", "dir_info": {"editable": True}},
            "pip install -e '/src/fastvar[lora]'",
        ),
        (None, {"url": "file:///src/fast%20var", "dir_info": {}}, "pip install '/src/fast var[lora]'"),
        (
            None,
            {"url": "file:///tmp/fastvar-2026.11.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/tmp/fastvar-2026.11.0-py3-none-any.whl[lora]'",
        ),
        (
            None,
            {"url": "https://host/fastvar.whl", "archive_info": {}},
            "pip install 'fastvar[lora] @ https://host/fastvar.whl'",
        ),
        (
            None,
            {"url": "https://host/fastvar.git", "vcs_info": COMMIT},
            "pip install 'fastvar[lora] @ git+https://host/fastvar.git@abc123'",
        ),
        (None, {}, "pip install '.[lora]' in a checkout of fastvar, or the same with a wheel or a git URL"),
    ],
)
def test_command(checkout: Path | None, origin: dict[str, Any], command: str) -> None:
    assert command_from("lora", checkout, origin) == command


def test_here() -> None:
    assert f"{ROOT}[train]" in install_command("train")


def test_message_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(self: Build) -> None:
        raise ImportError("No module named 'accelerate'")

    monkeypatch.setattr(Build, "run", missing)
    with pytest.raises(SystemExit):
        main(["build"])
    assert capsys.readouterr().err == f"fastvar: No module named 'accelerate'; {install_command('train')}\n"


def test_nothing_names_the_index() -> None:
    """`pip install` of the bare name, with or without an extra, in any text or message."""
    by_name = re.compile(r"pip install[^\n`]*?[ \"']fastvar(\[[^\]\n]*\])?(?! @)(?=[\s\"'`])")
    assert by_name.search('pip install "fastvar[rewards]"') and by_name.search("pip install -U fastvar ")
    for good in ("pip install 'fastvar[a] @ git+https://x'", "pip install ./fastvar-1.whl", "pip install '.[a]'"):
        assert not by_name.search(good)
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "fastvar").rglob("*.py"), ROOT / "Makefile"]
    assert [f"{path}: {match[0]}" for path in files for match in by_name.finditer(path.read_text())] == []


def test_version_is_above_the_strangers() -> None:
    """So that `pip install -U` never swaps one for the other."""
    assert re.fullmatch(r"20\d\d\.(1[0-2]|[1-9])\.\d+", fastvar.__version__)
    assert Version(fastvar.__version__) > STRANGER
