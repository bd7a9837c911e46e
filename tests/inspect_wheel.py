"""Check a wheel: `python tests/inspect_wheel.py dist/*.whl`. It may hold the package fastvar and nothing else."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expected_modules() -> set[str]:
    """The Python files of the checkout as they are named in a wheel."""
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastvar").rglob("*.py")}
    return package | {f"fastvar/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel, one line each."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    found = [
        f"unexpected top level {top}" for top in sorted(tops) if top != "fastvar" and not top.endswith(".dist-info")
    ]
    found += [f"missing {name}" for name in sorted(expected_modules() - names)]
    found += [f"missing {name}" for name in ("fastvar/py.typed",) if name not in names]
    if "fastvar/kernels/__init__.py" in names:
        found.append("fastvar/kernels must not have an __init__.py")
    return found


if __name__ == "__main__":
    wrong = [f"{path}: {problem}" for path in sys.argv[1:] for problem in problems(Path(path))]
    print("\n".join(wrong) or f"{len(sys.argv) - 1} wheel in order")
    sys.exit(bool(wrong) or len(sys.argv) < 2)
