"""Saving and loading of models: local folders, the hub, and what is said of damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvar.models import VAR, VQTokenizer, pretrained
from tests.helpers.tiny import RECTANGLES, some_subjects, tiny_tokenizer, tiny_var

LABELS = torch.tensor([0, 3])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_var(RECTANGLES, subject="block_causal").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(saved: Path) -> None:
    """The config, every weight to the bit, and the tokenizer with it; ready to sample."""
    var = tiny_var(RECTANGLES, subject="block_causal")
    loaded = VAR.from_pretrained(saved)
    assert loaded.config == var.config and not loaded.training
    assert list(loaded.state_dict()) == list(var.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in var.state_dict().items())
    assert loaded.tokenizer.config == var.tokenizer.config and not loaded.tokenizer.training
    subject = some_subjects(var, 1)
    expected = var.generate(LABELS, subject=subject, seed=2)
    got = loaded.generate(LABELS, subject=subject, seed=2)
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.images, expected.images)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    VAR(tiny_var().config).save_pretrained(tmp_path)
    loaded = VAR.from_pretrained(str(tmp_path))
    with pytest.raises(RuntimeError, match="tokenizer: none attached"):
        _ = loaded.tokenizer


def test_tokenizer_alone(saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(cosine=True, residual_ratio=0.0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = VQTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.config == tokenizer.config and loaded.phi is None
    images = torch.rand(1, 3, 6, 6)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert VQTokenizer.from_pretrained(saved / "tokenizer").config.grids == RECTANGLES


def test_saving_again_replaces(saved: Path) -> None:
    other = tiny_var(RECTANGLES, seed=5)
    other.save_pretrained(saved)
    assert torch.equal(VAR.from_pretrained(saved).head.weight, other.head.weight)
    assert not [path for path in saved.rglob("*") if path.name.endswith(".tmp")]


def test_weights_in_bfloat16(tmp_path: Path) -> None:
    tiny_var().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    loaded = VAR.from_pretrained(tmp_path)
    assert torch.equal(loaded.head.weight, tiny_var().head.weight.bfloat16().float())


@pytest.mark.parametrize("subfolder", ["", "tokenizer"])
def test_damaged_files(saved: Path, subfolder: str) -> None:
    folder = saved / subfolder
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message) as raised:
            VAR.from_pretrained(saved)
        assert str(folder) in str(raised.value)

    for part in (whole[: len(whole) // 2], whole[:5], b""):
        weights.write_bytes(part)
        refused(ValueError, r"expected a file of safetensors or torch.save, got .*model\.safetensors: ")
    weights.unlink()
    refused(FileNotFoundError, r"no such file: .*model\.safetensors")
    weights.write_bytes(whole)
    config.write_text(text[: len(text) // 2])
    refused(ValueError, r"config\.json: damaged file")
    config.write_text("[]")
    refused(ValueError, r"config\.json: damaged file: expected an object")
    config.write_text("[" * 100_000)
    refused(ValueError, r"config\.json: damaged file")
    config.write_text(text, encoding="utf-16")
    refused(ValueError, r"expected text in UTF-8, got .*config\.json")
    values = json.loads(text)
    config.write_text(json.dumps({**values, "colour": 1, "attn": 2}))
    refused(ValueError, r"config\.json: unknown fields \['attn', 'colour'\]")
    for value, expected in (("2", "int, got '2'"), (2.5, "int, got 2.5"), (True, "int, got True"), (-1, "at least 1")):
        config.write_text(json.dumps({**values, "vocab_size": value}))
        refused(ValueError, rf"config\.json: .*vocab_size: expected {expected}")
    config.write_text(json.dumps({**values, "grids": [[1, 2], [2]]}))
    refused(ValueError, r"config\.json: grids: expected tuple")
    if not subfolder:
        config.unlink()
        refused(FileNotFoundError, r"no such file: .*config\.json")


def test_configs_of_other_programs(saved: Path) -> None:
    """A byte order mark, whole numbers with a point."""
    config = saved / "config.json"
    values = json.loads(config.read_text())
    text = json.dumps({**values, "num_heads": 2.0, "mlp_ratio": 4, "grids": [[1.0, 2.0], [2, 3]]})
    config.write_text(text, encoding="utf-8-sig")
    loaded = VAR.from_pretrained(saved)
    assert loaded.config == tiny_var(RECTANGLES, subject="block_causal").config
    assert isinstance(loaded.config.num_heads, int) and isinstance(loaded.config.mlp_ratio, float)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_model(saved: Path, prefix: str) -> None:
    path = saved / "model.safetensors"
    state = load_file(path)
    save_file({prefix + name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in state.items()}, path)
    assert torch.equal(VAR.from_pretrained(saved).head.bias, state["head.bias"])
    save_file({prefix + name: tensor for name, tensor in state.items() if name != "head.bias"}, path)
    with pytest.raises(ValueError, match=rf"\n  missing key {prefix}head\.bias$"):
        VAR.from_pretrained(saved)


def test_weights_that_do_not_fit(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["extra"] = state.pop("head.bias")
    state["head.weight"] = state["head.weight"][:5].clone()
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"VAR: cannot load .*model\.safetensors:\n") as raised:
        VAR.from_pretrained(saved)
    assert str(raised.value).splitlines()[1:] == [
        "  missing key head.bias",
        "  unexpected key extra",
        "  head.weight: expected shape (32, 32), got (5, 32)",
    ]


def test_no_such_folder(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", "./nothing", "a/b/c", "~/nothing"):
        with pytest.raises(FileNotFoundError, match="from_pretrained: no such folder: "):
            VAR.from_pretrained(place)
    with pytest.raises(ValueError, match=r"from_pretrained: expected options out of .*'revision'.*, got \['strict'\]"):
        VAR.from_pretrained(tmp_path, strict=False)


def test_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer comes along, from the same revision; a repository without one is fine."""
    asked = []

    def download(repo_id: str, filename: str, *, subfolder: str | None = None, **options: Any) -> str:
        asked.append((repo_id, subfolder, filename, options))
        path = saved / (subfolder or "") / filename
        if not path.is_file():
            raise pretrained.EntryNotFoundError(f"404: {filename}")
        return str(path)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    loaded = VAR.from_pretrained("owner/some-model", revision="v1")
    assert loaded.tokenizer.config.grids == RECTANGLES
    assert {(repo, options["revision"]) for repo, _, _, options in asked} == {("owner/some-model", "v1")}
    assert {(folder, name) for _, folder, name, _ in asked} == {
        (folder, name) for folder in (None, "tokenizer") for name in ("config.json", "model.safetensors")
    }
    for path in (saved / "tokenizer").iterdir():
        path.unlink()
    assert not VAR.from_pretrained("owner/some-model")._tokenizer


def test_pickles() -> None:
    var = tiny_var()
    copied = pickle.loads(pickle.dumps(var))
    assert torch.equal(copied.generate(LABELS).tokens, var.generate(LABELS).tokens)
