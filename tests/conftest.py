"""Makes helper modules beside the tests importable under pytest's importlib mode: `from golden.golden import ...`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fresh_answers() -> Iterator[None]:
    """What "auto" takes is asked anew: a test may pretend that there is something else."""
    from fastvar.ops import _dispatch  # not before a test has set the environment

    _dispatch.forget_answers()
    yield
    _dispatch.forget_answers()
