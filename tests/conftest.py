"""What holds for all tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _fresh_answers() -> Iterator[None]:
    """What "auto" takes is asked anew: a test may pretend that there is something else."""
    from fastvar.ops import _dispatch  # not before a test has set the environment

    _dispatch.forget_answers()
    yield
    _dispatch.forget_answers()
