"""Metadata lives in pyproject.toml; here packages are listed and, as FASTVAR_BUILD asks, C++ and CUDA are compiled.

Without torch in the build's environment, as in an isolated build, the package is pure Python.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "fastvar"
# kernels/ is installed as fastvar.kernels. It has no __init__.py of its own, which would shadow the package `kernels`
# that transformers imports, and its folders need none.
KERNELS = sorted({f"fastvar.kernels.{path.parent.name}" for path in ROOT.glob("kernels/*/*.py")})


def load_build() -> ModuleType:
    """fastvar/build.py by its path: importing fastvar would import torch."""
    spec = importlib.util.spec_from_file_location("fastvar_build", PACKAGE / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()
try:
    REQUEST = build.requested()
except build.BuildError as error:
    raise SystemExit(str(error)) from None
REASONS = build.plan(REQUEST)
TARGETS = [target for target, reason in REASONS.items() if not reason]


class Distribution(setuptools.Distribution):
    """With a library inside, a wheel is for one platform. This is asked before the compilers run: with "auto", a wheel
    whose compilation failed has a platform's name too. It is right there, only less general than it could be."""

    def has_ext_modules(self) -> bool:
        return bool(TARGETS)


class BuildPython(build_py):
    """Adds the libraries, and a record of what was decided. An explicit request that fails ends the build."""

    def run(self) -> None:
        super().run()
        package = PACKAGE if self.editable_mode else Path(self.build_lib) / "fastvar"
        if not self.editable_mode:  # what an earlier build left there is of other sources, or not asked for
            for path in (package / build.RECORD, *package.glob("_*.abi3.so")):
                path.unlink(missing_ok=True)
        reasons = dict(REASONS)
        for target in TARGETS:
            try:
                build.build([target], package)
            except build.BuildError as error:
                if REQUEST != "auto":
                    raise SystemExit(f"FASTVAR_BUILD={REQUEST}: {error}") from None
                print(f"fastvar is installed without its {target} extension: {error}", file=sys.stderr)
                reasons[target] = str(error).splitlines()[0]
        if not self.editable_mode:  # a checkout may have libraries that somebody built before
            left_out = {t: {"state": "not built", "reason": reason} for t, reason in reasons.items() if reason}
            build.write_record(package, left_out)


setuptools.setup(
    packages=[*setuptools.find_packages(ROOT, include=["fastvar", "fastvar.*"]), "fastvar.csrc", *KERNELS],
    distclass=Distribution,
    cmdclass={"build_py": BuildPython},
    # the libraries do not depend on Python's ABI
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if TARGETS else {},
)
