"""Ranges that a profiler such as Nsight Systems shows, with FASTVAR_NVTX=1 in the environment; otherwise nothing."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

# Read once, when the package is first used, so that a call costs no look-up.
ENABLED = os.environ.get("FASTVAR_NVTX", "") not in ("", "0")
_NOTHING: AbstractContextManager[Any] = nullcontext()


def annotate(name: str) -> AbstractContextManager[Any]:
    """A range `fastvar::<name>`, made with the package nvtx.

    Raises:
        ImportError: FASTVAR_NVTX is set and nvtx is not installed.
    """
    if not ENABLED:
        return _NOTHING
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("FASTVAR_NVTX is set: pip install nvtx, or unset it") from error
    return nvtx.annotate(f"fastvar::{name}", domain="fastvar")
