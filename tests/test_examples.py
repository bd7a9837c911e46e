"""Every script of examples/, run in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from fastvar.models import VAR
from tests.golden.golden import load_case
from tests.helpers.tiny import tiny_var

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(folder: Path, **fields: Any) -> VAR:
    var = tiny_var(**fields)
    var.save_pretrained(folder)
    return var


def photos(folder: Path, classes: int) -> Path:
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        Image.new("RGB", (20, 24), (40 * label, 90, 200)).save(folder / str(label) / "a.png")
    return folder


def test_all_are_listed_and_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    listed, tested = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(f"`{name}.py`" in listed and f'example("{name}")' in tested for name in names)


def test_sample_public_weights(tmp_path: Path) -> None:
    case = load_case("var_tiny")
    torch.save(case.transformer, tmp_path / "var.pth")
    torch.save(case.tokenizer, tmp_path / "vae.pth")
    example("sample_public_weights").main(tmp_path / "var.pth", tmp_path / "vae.pth", (1, 2), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 0


def test_finetune_on_folder(tmp_path: Path) -> None:
    var = saved(tmp_path / "model")
    folder = photos(tmp_path / "photos", var.config.num_classes)
    example("finetune_on_folder").main(tmp_path / "model", folder, tmp_path / "run", steps=2, batch_size=2)
    after = VAR.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(after.head.weight, var.head.weight)


def test_own_reward(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    var = saved(tmp_path / "model")
    example("own_reward").main(tmp_path / "model", tmp_path / "run", iterations=1, group_size=2)
    after = VAR.from_pretrained(tmp_path / "run" / "model")
    assert after.state_dict().keys() == var.state_dict().keys()


def test_own_reader() -> None:
    module = example("own_reader")
    empty = {name: [] for name in ("text", "conf", "left", "top", "width", "height")}  # type: dict[str, list[Any]]
    word = {"text": ["", "fast"], "conf": [-1, 90], "left": [0, 8], "top": [0, 2], "width": [0, 16], "height": [0, 10]}
    answers = iter([empty, word])
    reward = module.OCRReward(module.TesseractReader(lambda image: next(answers)))
    found = reward(torch.ones(2, 3, 16, 32), ["fast", "fast"], None)
    assert found.scores[1] > found.scores[0]
    assert found.mask is not None and found.mask[1, 5, 12] and not found.mask[1, 5, 28]


def test_subject_from_photo(tmp_path: Path) -> None:
    var = saved(tmp_path / "model", subject="block_causal")
    Image.new("RGB", (40, 30), (200, 90, 20)).save(tmp_path / "photo.png")
    example("subject_from_photo").main(tmp_path / "model", tmp_path / "photo.png", 1, 3, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height >= var.tokenizer.config.image_size[0]


def test_policy_loss_in_your_loop(capsys: pytest.CaptureFixture[str]) -> None:
    example("policy_loss_in_your_loop").main()
    assert capsys.readouterr().out.count("loss") == 3


def test_attention_in_your_block() -> None:
    assert example("attention_in_your_block").main() < 1e-5


def test_profile_step() -> None:
    assert any(name.startswith("fastvar::") for name in example("profile_step").main(depth=1, batch=1))
