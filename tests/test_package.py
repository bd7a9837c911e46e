"""The package as it is installed: contents, weight of the import, versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.inspect_wheel import SOURCES, problems

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options)  # type: ignore[call-overload]


def test_kernels_has_no_init_of_its_own() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_sources_travel() -> None:
    """Every file of csrc is of a kind that package-data takes along."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "fastvar.csrc"
    ]
    assert set(patterns) == {f"*/*{suffix}" for suffix in SOURCES}
    assert {p.suffix for p in (ROOT / "csrc").glob("*/*")} <= set(SOURCES)


def test_headers_include_no_circle() -> None:
    """By their place in csrc, what is common nothing of an operator."""
    csrc = ROOT / "csrc"
    includes = {
        path.relative_to(csrc).as_posix(): re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
        for path in csrc.glob("*/*")
    }
    TopologicalSorter(includes).prepare()
    assert all(name in includes for names in includes.values() for name in names)
    assert all(n.startswith("common/") for path in includes if path.startswith("common/") for n in includes[path])


def test_import_is_light_and_silent() -> None:
    """Only torch: no triton, no driver, nothing printed, nothing else of weight."""
    code = """
import sys, torch
before = set(sys.modules)
sys.modules["triton"] = None  # importing it would raise
import fastvar, fastvar.ops
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"numpy", "scipy", "sklearn", "torchvision", "PIL", "accelerate", "huggingface_hub", "tyro",
               "safetensors", "transformers", "matplotlib", "tqdm"}
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_a_command_imports_only_its_own() -> None:
    done = python("import sys; from fastvar.cli import main; main(['--version']); print('torch' in sys.modules)")
    assert done.stdout.splitlines()[1:] == ["False"], done.stderr


def test_submodules_are_reached_from_the_package() -> None:
    done = python("import fastvar; fastvar.models.VAR; fastvar.data.ImageFolder; fastvar.ops.sample_tokens")
    assert done.returncode == 0, done.stderr


def test_what_there_is_can_be_listed() -> None:
    done = python("import fastvar; print(*dir(fastvar))")
    names = set(done.stdout.split())
    assert {
        "data",
        "integrations",
        "models",
        "ops",
        "rl",
        "training",
        "ScaleSchedule",
        "explain",
        "support",
        "__version__",
    } <= names


def test_versions_agree() -> None:
    done = python("import fastvar, importlib.metadata as m; print(fastvar.__version__, m.version('fastvar'))")
    if done.returncode:
        pytest.skip("fastvar is not installed, only importable")
    first, second = done.stdout.split()
    assert first == second


def test_wheel(tmp_path: Path) -> None:
    """A wheel built without isolation holds fastvar with all its kernels, works, and nothing else."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    environment = {**os.environ, "FASTVAR_BUILD": "none"}  # wheels with libraries: tests/test_build.py
    source = str(_copy(tmp_path / "source"))
    built = subprocess.run([*command, source], capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert problems(wheel) == []
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import fastvar, torch;"
        f"assert fastvar.__file__.startswith({str(site)!r});"
        "from fastvar import build; assert build.sources_digest('cpu') and build.record()['cpu']['reason'];"
        "from fastvar.ops import gated_residual; x = torch.ones(1, 1, 1); print(gated_residual(x, x, x[0]).item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip() == "2.0", ran.stderr


def _copy(target: Path) -> Path:
    """The parts of the checkout that a build reads, so that building leaves no traces in it."""
    import shutil

    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("fastvar", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_layers_point_down() -> None:
    """ops import no models, models no data or training, implementations neither each other
    (but for `common`) nor the operators, of which they know the types of calls alone."""
    forbidden = {
        "kernels": ("fastvar.ops", "fastvar.kernels", "fastvar.models", "fastvar.data", "fastvar.training"),
        "fastvar/ops": ("fastvar.models", "fastvar.data", "fastvar.training", "fastvar.rl", "fastvar.handwriting"),
        "fastvar/models": ("fastvar.data", "fastvar.training", "fastvar.rl", "fastvar.cli", "fastvar.handwriting"),
        "fastvar/integrations": (
            *(f"fastvar.{folder}" for folder in ("models", "data", "training", "rl", "cli", "handwriting")),
        ),
        "fastvar/training": ("fastvar.rl", "fastvar.cli", "fastvar.handwriting"),
        "fastvar/rl": ("fastvar.cli", "fastvar.handwriting", "fastvar.image_benchmarks"),
        "fastvar/data": ("fastvar.training", "fastvar.rl", "fastvar.cli", "fastvar.models", "fastvar.handwriting"),
        "fastvar/handwriting": ("fastvar.cli",),
        "fastvar/image_benchmarks": ("fastvar.cli", "fastvar.handwriting"),
    }
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder, modules in forbidden.items()
        for path in (ROOT / folder).rglob("*.py")
        for module in modules
        for line in re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", path.read_text()).splitlines()
        if line.strip().startswith((f"from {module}", f"import {module}"))
        and not (folder == "kernels" and any(f"fastvar.kernels.{own}" in line for own in (path.parent.name, "common")))
    ]
    assert found == []


def test_the_library_does_not_know_the_demo() -> None:
    """But for names that are resolved when they are used, and the command line's own modules for it."""
    knowing = {
        path.relative_to(ROOT / "fastvar").as_posix()
        for path in (ROOT / "fastvar").rglob("*.py")
        if "handwriting" in path.read_text().lower()
    }
    assert {name for name in knowing if not name.startswith("handwriting/")} == {
        "builtin.py",
        "cli/demo.py",
        "cli/sources.py",
    }


def test_profiles_show_ranges() -> None:
    """With FASTVAR_NVTX operators, scales and backward passes push ranges; without, nothing of nvtx is imported."""
    code = """
import sys, types
names = []
class annotate:
    def __init__(self, name, domain): names.append(name)
    def __enter__(self): pass
    def __exit__(self, *error): pass
sys.modules["nvtx"] = types.SimpleNamespace(annotate=annotate)
import torch
from fastvar.ops import gated_residual
x = torch.ones(1, 1, 1, requires_grad=True)
gated_residual(x, x, x[0]).sum().backward()
print(*names, sep=",")
"""
    for value, expected in (("1", "fastvar::gated_residual,fastvar::gated_residual backward"), ("0", "")):
        ran = python(code, env={**os.environ, "FASTVAR_NVTX": value})
        assert ran.stdout.strip() == expected, ran.stderr
