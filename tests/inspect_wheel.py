"""Check a wheel: `python tests/inspect_wheel.py dist/*.whl`. It may hold the package fastvar and nothing else."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".h", ".cpp", ".cu")


def expected_files() -> set[str]:
    """The Python files of the checkout and the sources of the extension as they are named in a wheel."""
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastvar").rglob("*.py")}
    inside = [*(ROOT / "kernels").rglob("*.py"), *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCES)]
    return package | {f"fastvar/{p.relative_to(ROOT).as_posix()}" for p in inside}


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel, one line each."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    found = [
        f"unexpected top level {top}" for top in sorted(tops) if top != "fastvar" and not top.endswith(".dist-info")
    ]
    found += [f"missing {name}" for name in sorted(expected_files() - names)]
    found += [f"missing {name}" for name in ("fastvar/py.typed", "fastvar/_build.json") if name not in names]
    if "fastvar/kernels/__init__.py" in names:
        found.append("fastvar/kernels must not have an __init__.py")
    libraries = [name for name in names if name.endswith(".so")]
    if bool(libraries) == wheel.name.endswith("-none-any.whl"):
        found.append(f"libraries {libraries} in a wheel of that name")
    return found


if __name__ == "__main__":
    wrong = [f"{path}: {problem}" for path in sys.argv[1:] for problem in problems(Path(path))]
    print("\n".join(wrong) or f"{len(sys.argv) - 1} wheel in order")
    sys.exit(bool(wrong) or len(sys.argv) < 2)
