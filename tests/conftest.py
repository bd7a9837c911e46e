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


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is compiled for a capability other than 9.0 is marked, as it takes minutes."""
    for item in items:
        found = getattr(item, "callspec", None)
        if item.path.name == "test_ahead_of_time.py" and found and found.params.get("capability", 90) != 90:
            item.add_marker(pytest.mark.cards)
