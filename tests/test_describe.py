"""`fastvar info PATH`: what a file or a folder is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar.cli.describe import describe
from fastvar.models import (
    VAR,
    BSQTokenizer,
    BSQTokenizerConfig,
    Infinity,
    InfinityConfig,
    VARConfig,
    VQTokenizer,
    VQTokenizerConfig,
)
from tests.golden.golden import load_case
from tests.helpers.tiny import tiny_infinity
from tests.models.test_infinity_checkpoints import public_transformer

GRIDS = ((1, 1), (2, 3))


def said(path: Path) -> str:
    return "\n".join(describe(path))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What training leaves, without the training."""
    shape = {"vocab_size": 16, "code_channels": 8}
    vq = VQTokenizer(VQTokenizerConfig(GRIDS, channels=8, channel_multipliers=(1, 2), norm_groups=4, **shape))
    names = ("cat", "dog")
    var = VAR(VARConfig(GRIDS, depth=1, embed_dim=8, num_heads=2, num_classes=2, class_names=names, **shape), vq)
    var.save_pretrained(tmp_path / "run/model")
    (tmp_path / "run/settings.json").write_text(json.dumps({"train": {}}))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 1.25}\n')
    (tmp_path / "run/checkpoints/step-00000020").mkdir(parents=True)
    return tmp_path / "run"


def test_models_and_runs(run: Path) -> None:
    model = said(run / "model")
    for part in (
        "model: a VAR, grids 1,2x3, 16 codes of 8 channels",
        "depth 1, width 8, 2 heads",
        "2 classes: cat, dog",
    ):
        assert part in model
    count = sum(p.numel() for p in VAR.from_pretrained(run / "model").parameters())
    assert f"tokenizer: {run}/model/tokenizer" in model and f"{count:,} parameters in float32" in model
    assert said(run / "model/config.json") == model
    assert "a VQTokenizer" in said(run / "model/tokenizer") and "4 x 6 pixels" in said(run / "model/tokenizer")
    whole = said(run)
    for part in ("the folder of a run (training)", "step 20, loss 1.25", "checkpoints: 20", model):
        assert part in whole
    assert "goes on from it" in said(run / "checkpoints/step-00000020")
    assert "2 lines of metrics" in said(run / "metrics.jsonl")
    (run / "model/model.safetensors").unlink()
    assert "no weights: model.safetensors is missing" in said(run)
    (run / "model/config.json").unlink()
    assert "no model yet: the same command goes on with the run" in said(run)


def test_files(run: Path) -> None:
    case = load_case("var_tiny")
    torch.save({"trainer": {"var_wo_ddp": case.transformer, "vae_local": case.tokenizer}}, run / "both.pth")
    both = said(run / "both.pth")
    assert "a public VAR transformer, for fastvar.models.load_var under var_wo_ddp" in both
    assert "a public VAR tokenizer, for fastvar.models.load_var under vae_local" in both
    torch.save({"module.a": torch.zeros(3, 4)}, run / "some.pt")
    assert said(run / "some.pt").endswith("a state dict; 12 parameters in float32")
    torch.save([1], run / "none.pt")
    assert said(run / "none.pt").endswith("no tensors")
    weights = said(run / "model/model.safetensors")
    assert weights.endswith("parameters in float32")
    (run / "renamed.pth").write_bytes((run / "model/model.safetensors").read_bytes())
    assert said(run / "renamed.pth").split(": ", 1)[1] == weights.split(": ", 1)[1]
    assert said(run / "settings.json").endswith("JSON with train")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(run / "a.png")
    assert said(run / "a.png").endswith("a picture of 4 x 5 pixels")
    (run / "prompts.txt").write_text("a\nb\n")
    assert said(run / "prompts.txt").endswith("a text of 2 lines")
    for name in ("b", "a"):
        (run / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(run / "photos" / name / "1.png")
    assert said(run / "photos").endswith("a data set of 2 images: a, b")
    (run / "empty").mkdir()
    assert "a folder without a model, a run or a data set" in said(run / "empty")
    (run / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (run / "binary", run / "nowhere"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"info: path: expected .*{path.name}"):
            said(path)


def test_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved one, and public files of the transformer and of the tokenizer, which are not read for it."""
    mapped, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **options: mapped.append(options["mmap"]) or load(*a, **options))
    bsq = BSQTokenizer(BSQTokenizerConfig(GRIDS, bits=8, channels=8, channel_multipliers=(1, 2), norm_groups=4))
    bsq.save_pretrained(tmp_path / "tokenizer")
    assert "a BSQTokenizer, grids 1,2x3, 8 bits a token\n  images of 4 x 6 pixels" in said(tmp_path / "tokenizer")
    shape = {"bits": 8, "depth": 1, "embed_dim": 8, "num_heads": 2, "pool_heads": 2}
    Infinity(InfinityConfig(GRIDS, **shape, text_channels=5, text_length=7)).save_pretrained(tmp_path / "model")
    model = said(tmp_path / "model")
    for part in (
        "model: an Infinity, grids 1,2x3, 8 bits a token\n  depth 1, width 8, 2 heads, subject none\n",
        "condition: texts of up to 7 rows of 5 channels\n  tokenizer: none, it cannot sample",
    ):
        assert part in model
    torch.save({"cfg_uncond": torch.zeros(7, 5), "word_embed.weight": torch.zeros(8, 8)}, tmp_path / "infinity.pth")
    assert "a public Infinity transformer, for fastvar.models.load_infinity; 99 par" in said(tmp_path / "infinity.pth")
    torch.save({"vae": {"encoder.conv_in.conv.weight": torch.zeros(8, 3, 3, 3)}, "step": 3}, tmp_path / "vae.pth")
    assert "a public Infinity tokenizer, for fastvar.models.load_infinity under vae; 216 par" in said(
        tmp_path / "vae.pth"
    )
    assert mapped == [True, True]
    old = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    assert said(old).endswith("a state dict; 3 parameters in float32") and mapped[-1] is False


def test_shards(tmp_path: Path) -> None:
    """A folder of them, as the public 8B comes."""
    net = tiny_infinity()
    state = public_transformer(net)
    names = sorted(state)
    parts = {"a.pth": names[:9], "b.pth": names[9:]}
    for file, own in parts.items():
        torch.save({name: state[name] for name in own}, tmp_path / file)
    places = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": places}))
    shown = said(tmp_path)
    assert shown.startswith(f"{tmp_path}: a public Infinity transformer, for fastvar.models.load_infinity; ")
    assert "  depth 3, width 32, 2 heads, 8 bits a token\n  condition: texts of up to 6 rows of 12" in shown
