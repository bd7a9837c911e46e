"""A pickle planted at any place that is read does not run. (Checkpoints of a run: tests/training/test_checkpoints.py,
rewards by a model: tests/rl/test_reward_models.py.)"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvar.kernels.common.tiling import own_path, own_tiles
from PIL import Image
from torch import nn

from fastvar.cli.reinforcement import RewardOptions
from fastvar.data import ImageFolder
from fastvar.handwriting import Reader
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig, load_var
from fastvar.rl.ablation import run_ablations
from fastvar.rl.rewards.models import load_weights
from fastvar.training.lock import LOCK, locked
from fastvar.training.log import RunLog, read_metrics
from fastvar.training.settings import check_same_settings, write_settings

GRIDS = ((1, 1), (2, 2))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def tokenizer() -> VQTokenizer:
    return VQTokenizer(VQTokenizerConfig(grids=GRIDS, vocab_size=8, code_channels=4, channels=32, norm_groups=4))


def var() -> VAR:
    return VAR(
        VARConfig(grids=GRIDS, depth=1, embed_dim=8, num_heads=1, vocab_size=8, code_channels=4, num_classes=2),
        tokenizer(),
    )


def model(folder: Path) -> None:
    VAR.from_pretrained(str(folder)).tokenizer  # noqa: B018


def prompts(path: Path) -> None:
    RewardOptions(prompt_file=path).load_prompts(var(), count=2, train=True)


def settings(path: Path) -> None:
    with suppress(Exception):
        check_same_settings(path, {"train": {}})
    write_settings(path, {}, 3, 4)


def tiles(path: Path) -> None:
    own_tiles.cache_clear()
    own_tiles("a card")


def held(path: Path) -> None:
    with locked(path.parent):
        pass


# The file that is planted, and what reads it, given that file.
PLACES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights of a model": ("model/model.safetensors", lambda path: model(path.parent)),
    "another format of weights": ("model/pytorch_model.bin", lambda path: model(path.parent)),
    "config of a model": ("model/config.json", lambda path: model(path.parent)),
    "weights of its tokenizer": ("model/tokenizer/model.safetensors", lambda path: model(path.parent.parent)),
    "config of its tokenizer": ("model/tokenizer/config.json", lambda path: model(path.parent.parent)),
    "public transformer": ("var_d16.pth", lambda path: load_var(path, {})),
    "public tokenizer": ("vae.pth", lambda path: load_var({}, path)),
    "cache of the reader": ("reader.safetensors", Reader),
    "weights of a reward": ("reward.pth", lambda path: load_weights(nn.Linear(2, 2), path, "reward")),
    "tensors of a reward": ("reward.safetensors", lambda path: load_weights(nn.Linear(2, 2), path, "reward")),
    "prompts": ("prompts.txt", prompts),
    "settings of a run": ("settings.json", settings),
    "metrics of a run": ("metrics.jsonl", read_metrics),
    "metrics of a run that goes on": ("metrics.jsonl", lambda path: RunLog(path.parent, 1, 2, title="").close()),
    "lock of a run": (LOCK, held),
    "table of ablations": ("table.toml", lambda path: run_ablations(path, path.parent / "out")),
    "image of a class": ("photos/a/planted.png", lambda path: ImageFolder(path.parent.parent, size=(8, 8))[0]),
    "tiles of a card": ("tiles", tiles),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("zipped", [False, True])
def test_planted_code_does_not_run(place: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, read = PLACES[place]
    if name.startswith("model"):
        var().save_pretrained(tmp_path / "model")
    path = own_path("a card") if name == "tiles" else tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    ran, bomb = tmp_path / "ran", tmp_path / "bomb.pt"
    if zipped:
        torch.save({"weight": Bomb(ran)}, bomb)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(ran), protocol=2))
    with suppress(Exception):
        torch.load(bomb, weights_only=False)
    assert ran.exists()
    ran.unlink()
    shutil.copy(bomb, path)
    with suppress(Exception):  # whether and how it is refused is the matter of other tests
        read(path)
    assert not ran.exists()
    if name == "tiles":
        own_tiles.cache_clear()


def test_the_same_readers_read_what_belongs_there(tmp_path: Path) -> None:
    var().save_pretrained(tmp_path / "model")
    model(tmp_path / "model")
    (tmp_path / "photos/a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/a/planted.png")
    PLACES["image of a class"][1](tmp_path / "photos/a/planted.png")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "reward.pth")
    PLACES["weights of a reward"][1](tmp_path / "reward.pth")
    (tmp_path / "prompts.txt").write_text("0\ta thing\n")
    prompts(tmp_path / "prompts.txt")
