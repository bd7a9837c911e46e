"""Checkpoints: bit-equal, whole or refused by name, never run, and nothing left behind by a full disk."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from fastvar.training.checkpoints import MANIFEST, Checkpoints, checkpoint_folder, measured, saved_steps
from fastvar.training.ema import EMA


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    def clone(self, device: str | None = None) -> Model:
        return copy.deepcopy(self) if device is None else copy.deepcopy(self).to(device)


class Progress:
    def __init__(self) -> None:
        self.best = 0.5

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Run:
    """A run in small: what `Checkpoints` saves, and steps that change all of it."""

    def __init__(self, output: Path, seed: int = 0, **options: Any) -> None:
        set_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.inner = Model()
        self.average, self.progress = EMA(self.inner, 0.5), Progress()
        optimizer = torch.optim.AdamW(self.inner.parameters(), lr=0.1, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.checkpoints = Checkpoints(
            self.accelerator,
            output,
            self.model,
            self.optimizer,
            self.average,
            **{"keep": 9, "progress": self.progress, **options},
        )

    def step(self) -> float:
        loss = self.model(torch.randn(2, 3, 4, 4)).square().sum() * random.random() * np.random.rand()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.inner)
        self.progress.best += random.random()
        return loss.item()

    def to(self, step: int) -> Run:
        """Steps from 0 on, each saved."""
        for done in range(1, step + 1):
            self.step()
            self.checkpoints.save(done)
        return self

    def state(self) -> list[torch.Tensor]:
        numbers = [torch.tensor([self.progress.best, self.average.updates])]
        return [*self.inner.state_dict().values(), *self.average.model.state_dict().values(), *numbers]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 1 to 3."""
    Run(tmp_path).to(3)
    return tmp_path


def test_goes_on_bit_equal(output: Path) -> None:
    straight = Run(output / "other").to(3)
    after = [straight.step() for _ in range(2)]
    resumed = Run(output, seed=7)
    assert resumed.checkpoints.newest() == 3
    resumed.checkpoints.load(3)
    assert [resumed.step() for _ in range(2)] == after
    assert all(torch.equal(a, b) for a, b in zip(straight.state(), resumed.state(), strict=True))


def test_before_the_first_step(tmp_path: Path) -> None:
    """The optimizer has no moments yet: the first step after it is the first one."""
    Run(tmp_path).checkpoints.save(0)
    expected = Run(tmp_path).step()
    resumed = Run(tmp_path, seed=7)
    resumed.checkpoints.load(0)
    assert resumed.step() == expected and resumed.optimizer.state_dict()["state"][0]["step"] == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", cut, "model.safetensors has .* bytes, expected"),
        ("average.safetensors", flip, "average.safetensors is damaged: its checksum"),
        ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is missing"),
        ("state.json", flip, "state.json is damaged: its checksum"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, cut, "manifest.json is damaged"),
        (MANIFEST, lambda path: path.write_text('{"files": {}}'), "does not name average.safetensors"),
    ],
)
def test_what_is_not_whole_is_named_and_the_one_before_taken(
    name: str, damage: Any, said: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint_folder(output, 3) / name)
    run = Run(output, keep=1)
    assert run.checkpoints.newest() == 2
    shown = capsys.readouterr().err
    assert re.search(rf"step-00000003: .*{said}", shown) and "going on from" in shown and "step-00000002" in shown
    run.checkpoints.load(2)
    run.step()
    run.checkpoints.save(3)
    assert Run(output).checkpoints.newest() == 3 and saved_steps(output) == [3]


def test_a_broken_one_drives_out_no_whole_one(output: Path) -> None:
    shutil.copytree(checkpoint_folder(output, 3), checkpoint_folder(output, 9))
    cut(checkpoint_folder(output, 9) / "state.json")
    run = Run(output, keep=2)
    run.checkpoints.load(run.checkpoints.newest())
    run.checkpoints.save(4)
    assert saved_steps(output) == [3, 4, 9]


def test_none_that_is_whole(output: Path) -> None:
    for step in (1, 2, 3):
        cut(checkpoint_folder(output, step) / "state.json")
    with pytest.raises(ValueError, match=r"no checkpoint that is whole: .*step-00000003: state.json has .*--no-resume"):
        Run(output).checkpoints.newest()
    assert Run(output / "nothing").checkpoints.newest() is None


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def fit_manifest(folder: Path) -> None:
    """As one who plants a file would."""
    files = {path.name: measured(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
def test_planted_code_does_not_run(name: str, output: Path, tmp_path: Path) -> None:
    folder = checkpoint_folder(output, 3)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    for extra in (
        "custom_checkpoint_0.pkl",
        "pytorch_model.bin",
        "random_states_0.pkl",
    ):  # where accelerate has pickles
        (folder / extra).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    fit_manifest(folder)
    run = Run(output)
    with pytest.raises(ValueError, match="step-00000003"):
        run.checkpoints.load(run.checkpoints.newest())
    assert not (tmp_path / "ran").exists()


def test_another_runs_checkpoint(output: Path) -> None:
    folder = checkpoint_folder(output, 3)
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    fit_manifest(folder)
    with pytest.raises(ValueError, match="step-00000003 does not hold a checkpoint of this run"):
        Run(output).checkpoints.load(3)


def former(run: Run, output: Path, step: int) -> Path:
    """A checkpoint as versions without manifests wrote it."""
    run.accelerator.register_for_checkpointing(run.average, run.progress)
    folder = checkpoint_folder(output, step)
    run.accelerator.save_state(str(folder))
    return folder


def test_former_checkpoints(tmp_path: Path) -> None:
    """Read as they were, but nothing in them is run."""
    straight = Run(tmp_path)
    straight.step()
    folder = former(straight, tmp_path, 4)
    expected = straight.step()
    resumed = Run(tmp_path, seed=7)
    assert resumed.checkpoints.newest() == 4
    resumed.checkpoints.load(4)
    assert resumed.step() == expected
    assert all(torch.equal(a, b) for a, b in zip(straight.state(), resumed.state(), strict=True))
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl"):
        content = (folder / name).read_bytes()
        for planted in (pickle.dumps(Bomb(tmp_path / "ran"), protocol=2), content[:-50]):
            (folder / name).write_bytes(planted)
            with pytest.raises(ValueError, match=rf"{name}: damaged, or holds more than tensors and numbers"):
                resumed.checkpoints.load(4)
        torch.save(Bomb(tmp_path / "ran"), folder / name)
        with pytest.raises(ValueError, match=rf"{name}: damaged, or holds more than tensors and numbers"):
            resumed.checkpoints.load(4)
        torch.save([1], folder / name)
        with pytest.raises(ValueError, match="step-00000004 does not hold a checkpoint of this run"):
            resumed.checkpoints.load(4)
        (folder / name).write_bytes(content)
    assert not (tmp_path / "ran").exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 1000, 2000, 10_000])
def test_what_cannot_be_written(size: int, output: Path) -> None:
    """Whichever file it is that does not fit: one clear line, nothing half-written, the former ones still there."""
    run = Run(output).to(3)
    run.step()
    with files_of_at_most(size), pytest.raises(OSError, match=r"step-00000004: could not be written: .*too large"):
        run.checkpoints.save(4)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [f"step-0000000{i}" for i in (1, 2, 3)]
    assert run.checkpoints.save(4).is_dir()


def test_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvar.training import checkpoints

    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    seldom, often = Run(tmp_path / "seldom").checkpoints, Run(tmp_path / "often", minutes=2.0).checkpoints
    assert not often.due()
    now = 121.0
    assert often.due() and not seldom.due()
    often.save(1)
    assert not often.due()
    monkeypatch.setattr(checkpoints, "what_is_wrong", lambda folder: advance(50))

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    often.save(1)  # takes 50 seconds
    for seconds, due in ((900, False), (101, True)):
        advance(seconds)
        assert often.due() is due


def test_free_space_is_said(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvar import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 3 << 20))
    with files_of_at_most(100), pytest.raises(OSError, match=r"\(3 MiB were free\)"):
        Run(output).checkpoints.save(9)


def test_clearing_leaves_what_is_others(output: Path) -> None:
    (output / "checkpoints" / "sd.safetensors").write_text("mine")
    (output / "checkpoints" / ".step-00000009.tmp").mkdir()
    Run(output).checkpoints.clear()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["sd.safetensors"]


def test_an_unreadable_one_is_named(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvar.training import checkpoints

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "measured", fails)
    with pytest.raises(ValueError, match=r"no checkpoint that is whole: .*step-00000003: cannot be read: "):
        Run(output).checkpoints.newest()
