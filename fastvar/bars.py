"""Progress bars, where somebody sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable[Any] | None = None, *, active: bool = True, **options: Any) -> Any:
    """A bar of tqdm on a terminal or in a notebook. Elsewhere, as in the log of a job, it draws nothing.

    Args:
        items: to iterate over, or None to advance it by hand.
        active: False for none at all, as in all processes but the first.
        options: of tqdm.
    """
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook's standard error is no terminal
    return tqdm(items, disable=not (active and seen), dynamic_ncols=True, **options)
