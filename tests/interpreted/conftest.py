"""Triton's kernels in its interpreter, on a CPU: run by test_in_processes.py in processes of their own.

TRITON_INTERPRET=1 has to be set before triton is first imported and holds for the whole process.
"""

import os
from pathlib import Path
from typing import Any

_STARTS_THEM = "test_in_processes.py"

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = [_STARTS_THEM]
    import triton
    from triton.runtime import interpreter

    from tests.helpers import bfloat16, bounds_check, interpreter_speed, reductions

    bounds_check.install()
    bfloat16.install()
    reductions.install()
    interpreter_speed.install()
    if triton.__version__.startswith("3.6."):
        # Its loop bounds are arrays of one element, which numpy 2.4 no longer takes for integers.
        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != _STARTS_THEM]
