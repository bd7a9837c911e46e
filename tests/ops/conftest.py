"""Makes the sibling module samples.py importable under pytest's importlib mode; fixtures."""

import sys
from pathlib import Path

import pytest

from fastvar.ops import _extension

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["C++", "PyTorch"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the backend "cpu" of operators over rows does its work: with the extension and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(_extension, "_lack", lambda *_: "not wanted")
    elif _extension._lack("cpu", "adaptive_layer_norm") is not None:
        pytest.skip("the cpu extension is not built")
    return request.param
