"""Triton's kernels in its interpreter, on a CPU: run by tests/ops/test_interpreted.py in a process of its own.

TRITON_INTERPRET=1 has to be set before triton is first imported and holds for the whole process.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "ops"), str(Path(__file__).parent)]

if os.environ.get("TRITON_INTERPRET") == "1":
    import bounds_check

    bounds_check.install()
else:
    collect_ignore_glob = ["test_*.py"]
