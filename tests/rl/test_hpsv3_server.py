"""The server for HPSv3 with a stand-in for its package, asked by the reward "remote"."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.rl.rewards import RemoteReward
from tests.rl.test_remote_reward import running

FILE = Path(__file__).resolve().parents[2] / "recipes/hpsv3/server.py"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("no_proxy", "*")
    spec = importlib.util.spec_from_file_location("hpsv3_server", FILE)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_scores_come_back(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, the mean alone, images and prompts where they belong, whatever the order of the model's arguments."""
    asked: list[tuple[int, list[str]]] = []

    class Inferencer:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def reward(self, image_paths: Any, prompts: Any) -> torch.Tensor:
            asked.append((len(image_paths), prompts))
            red = [image.getpixel((0, 0))[0] / 255 for image in image_paths]
            return torch.tensor([[red[i] + len(prompts[i]), 9.0] for i in range(len(prompts))])

    monkeypatch.setitem(sys.modules, "hpsv3", SimpleNamespace(HPSv3RewardInferencer=Inferencer))
    images = torch.zeros(3, 3, 4, 6)
    images[1, 0] = 1
    with running(module.server(module.HPSv3("cpu", 2), "127.0.0.1", 0)) as url:
        scores = RemoteReward(url, retries=0)(images, ["a", "bb", "ccc"]).scores
    assert scores.tolist() == [1.0, 3.0, 3.0] and asked == [(2, ["a", "bb"]), (1, ["ccc"])]


def test_failures_are_told(module: ModuleType) -> None:
    def broken(images: Any, prompts: Any) -> Any:
        raise ValueError("out of memory")

    images = torch.zeros(2, 3, 4, 6)
    with (
        running(module.server(broken, "127.0.0.1", 0)) as url,
        pytest.raises(RuntimeError, match="ValueError: out of memory"),
    ):
        RemoteReward(url, retries=0)(images, ["a", "b"])
    with running(module.server(lambda images, prompts: [1.0, float("nan")], "127.0.0.1", 0)) as url:
        first, second = RemoteReward(url, retries=0)(images, ["a", "b"]).scores.tolist()
    assert first == 1.0 and second != second


def test_it_stands_alone() -> None:
    """It runs in an environment without fastvar."""
    imports = [line for line in FILE.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert imports and not any("fastvar" in line for line in imports)
