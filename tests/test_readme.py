"""The README is true: its blocks run in order, its support matrix is the program's, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image

import fastvar
from fastvar.cli import main
from fastvar.cli.build import Build
from fastvar.handwriting.demo import DemoConfig, tokenizer_config, var_config
from fastvar.models import VAR, VQTokenizer
from tests.golden.golden import load_case

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)
SMALL = {
    "train-tokenizer": "--steps 2 --batch-size 2 --vocab-size 16 --code-channels 8 --channels 8 --norm-groups 4",
    "train": "--steps 2 --batch-size 2 --depth 1 --width 16 --heads 2",
    "sample": "--count 2",
    "choose-middle": "--prompt-count 2 --prefixes 2 --continuations 2 --rewards ocr colour",  # untrained, none is read
    "rl": "--iterations 1 --prompts 1 --group-size 2 --evaluation-samples 8",
    "evaluate": "--samples 8",
}


def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and commands from top to bottom in one folder, as a reader runs them. In it are photos, and the VAR that
    `make demo` leaves, untrained. Commands run in small; nothing is downloaded, installed or compiled."""
    monkeypatch.chdir(tmp_path)
    for label in ("cats", "dogs"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (48, 40), (40 * i, 90, 120)).save(tmp_path / "photos" / label / f"{i}.png")
    demo = DemoConfig(width=32, depth=1)
    VAR(var_config(demo), VQTokenizer(tokenizer_config(demo))).save_pretrained(demo.output / "var" / "model")
    case = load_case("var_tiny")
    public = {"var_d16.pth": case.transformer, "vae_ch160v4096z32.pth": case.tokenizer}

    def download(repository: str, name: str) -> str:
        assert repository == "FoundationVision/var"
        torch.save(public[name], name)
        return name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(Build, "run", lambda self: None)
    for number, (language, text) in enumerate(BLOCKS):
        if language == "python":
            exec(compile(text, f"README block {number}", "exec"), {})
        else:
            for line in text.splitlines():
                run(line)
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "runs/ocr/best/config.json").is_file()


def run(line: str) -> None:
    """A line of a shell; pip's and make's are only looked up."""
    words = [word for word in shlex.split(line, comments=True) if not word.startswith("FASTVAR_")]
    match words:
        case []:
            pass
        case ["make", target]:
            assert f"\n{target}: " in (ROOT / "Makefile").read_text(), line
        case ["pip", "install", *_, source]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = re.search(r"\[(.*)\]", source)
            assert set(named[1].split(",") if named else []) <= set(extras), line
        case ["fastvar", command, *arguments]:
            main([command, *arguments, *SMALL.get(command, "").split()])
        case _:
            pytest.fail(f"nobody knows how to check {line!r}")


def test_support_matrix_is_current() -> None:
    start, end = "<!-- support matrix -->\n", "<!-- end of support matrix -->"
    shown = README.split(start)[1].split(end)[0]
    assert shown.strip() == fastvar.support().markdown().strip()


def test_environment_variables_are_listed() -> None:
    used = set()
    for folder in ("fastvar", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"FASTVAR_[A-Z_]+", path.read_text()))
    assert used == set(re.findall(r"`(FASTVAR_[A-Z_]+)`", (ROOT / "docs" / "backends.md").read_text()))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    """To files that are there, and to headings in them."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.is_file(), target
            assert not heading or heading in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
