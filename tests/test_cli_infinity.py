"""The command line for texts and Infinity: features kept, training from images with texts, samples, public weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastvar import models
from fastvar.cli import infinity, main
from fastvar.cli.common import load_encoder
from fastvar.models import VAR, CharacterTextEncoder, EncodedTexts, Infinity, VARConfig
from fastvar.schedule import infinity_schedule
from fastvar.training import train as train_it
from tests.data.test_text_images import write
from tests.helpers.tiny import tiny_bits, tiny_infinity, tiny_tokenizer
from tests.models.test_infinity_checkpoints import public_tokenizer, public_transformer

CHECKPOINTING = ["--gradient-checkpointing", "--steps", "1"]
SHAPE = ["--depth", "1", "--width", "16", "--heads", "2", "--steps", "2", "--batch-size", "2", "--log-every", "1"]


def run(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit):
        run(*arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1
    return error


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Images with texts, and a tokenizer of 6 x 6 pixels."""
    for number, text in enumerate(("red", "green", "blue")):
        write(tmp_path / f"data/{number}.png", 12, 12 + 6 * number, text, 80 * number)
    tiny_bits().save_pretrained(tmp_path / "bsq")
    return tmp_path


def test_from_texts_to_pictures(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = ["encode-text", "--text-encoder", "characters-12", "--max-length", 8, "--output", work / "texts"]
    (work / "more.txt").write_text("a\u2028b\r\n\nred \n", encoding="utf-8-sig")
    run(*encode, "--data", work / "data")
    assert capsys.readouterr().out == f"{work}/texts: 3 texts encoded, 0 were there\n"
    run(*encode, "--texts", work / "more.txt")
    assert capsys.readouterr().out == f"{work}/texts: 1 texts encoded, 1 were there\n"
    assert len(EncodedTexts(work / "texts")) == 4 and not EncodedTexts(work / "texts").missing(["a\u2028b", "red"])
    train = ["train", "--task", "infinity", "--data", work / "data", "--tokenizer", work / "bsq", *SHAPE]
    run(*train, "--text-encoder", work / "texts", "--output", work / "run", "--gradient-checkpointing")
    assert f"infinity: {work}/run/model (2 steps" in capsys.readouterr().out
    model = Infinity.from_pretrained(work / "run/model")
    assert model.config.text_encoder == "characters-12" and model.config.text_length == 8
    assert (work / "run/pictures/step-00000002.png").is_file()
    run("info", work / "run/model")
    told = capsys.readouterr().out
    assert "condition: texts of up to 8 rows of 12 channels (characters-12)" in told and "2 heads, subject none" in told
    run("info", work / "texts")
    assert capsys.readouterr().out == f"{work}/texts: features of 4 texts, 12 channels of characters-12\n"
    sample = ["sample", "--model", work / "run", "--count", 2, "--output"]
    run(*sample, work / "a.png", "--prompt", "red", "a red one")
    assert Image.open(work / "a.png").size == (2 + 2 * 8, 2 + 2 * 8)
    run(
        *sample, work / "b.png", "--labels", "red", "a red one", "--text-encoder", "characters-12", "--dtype", "float32"
    )
    assert (work / "a.png").read_bytes() == (work / "b.png").read_bytes()
    guided = ("--prompt", "red", "a red one", "--guidance", 1e4)  # hardly trained, texts say little
    run(*sample, work / "from_none.png", *guided)
    run(*sample, work / "from_red.png", *guided, "--negative", "red")
    assert (work / "from_none.png").read_bytes() != (work / "from_red.png").read_bytes()
    run(*sample, work / "c.png", "--prompt", "red", "--grids", "1,2x1,4x2")
    assert Image.open(work / "c.png").size == (2 + 2 * 6, 12)
    assert "got 'x'; fastvar encode-text adds them" in refused(
        capsys, *sample, work / "d.png", "--prompt", "x", "--text-encoder", work / "texts"
    )
    run(*train[:-2], "--start", work / "run/model", "--output", work / "further", "--no-resume")
    assert Infinity.from_pretrained(work / "further/model").config == model.config


def test_ratios(work: Path) -> None:
    """The budget's schedules, one of which each image takes; what is saved and shown has the one of squares."""
    train = ["train", "--task", "infinity", "--data", work / "data", "--tokenizer", work / "bsq", *SHAPE]
    train += ["--text-encoder", "characters-12", "--batch-size", 1, "--steps", 1]
    run(*train, "--budget", "0.06M", "--output", work / "run")
    squares = infinity_schedule("0.06M")

    def check(net: Infinity) -> None:
        assert net.schedule == net.config.schedule == squares
        assert net.tokenizer.schedule == net.tokenizer.config.schedule == squares

    check(Infinity.from_pretrained(work / "run/model"))
    assert Image.open(work / "run/pictures/step-00000001.png").size == (2 + 3 * 34, 2 + 34)
    run(*train, "--start", work / "run", "--output", work / "further")  # the tokenizer's folder has other grids
    check(Infinity.from_pretrained(work / "further/model"))
    tiny_infinity().save_pretrained(work / "small")
    loaded = infinity.load("start", work / "small", None, squares)
    check(loaded)
    check(loaded.add_subject())


def test_subjects_of_pairs(work: Path) -> None:
    """A subject added to a model that has none, trained on a folder of subjects, and drawn from two photos."""
    train = ["train", "--task", "infinity", "--tokenizer", work / "bsq", *SHAPE, "--text-encoder", "characters-12"]
    run(*train, "--data", work / "data", "--output", work / "run")
    for number in range(2):
        write(work / f"subjects/cat/{number}.png", 12, 12, f"a cat {number}")
        write(work / f"subjects/cat/references/{number}.png", 20, 10, colour=100 * number)
    subject = ["--start", work / "run", "--subject", "block_causal", "--data", work / "subjects"]
    run(*train, *subject, "--output", work / "subject")
    assert Infinity.from_pretrained(work / "subject/model").config.subject == "block_causal"
    run(*train, *subject[2:], "--output", work / "new")
    photos = [work / f"subjects/cat/references/{number}.png" for number in range(2)]
    sample = ["sample", "--model", work / "subject", "--prompt", "a cat", "--count", 2, "--references", *photos]
    run(*sample, "--output", work / "a.png")
    assert Image.open(work / "a.png").size == (2 + 2 * 8, 2 + 8)


def test_handwriting(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def watched(task: Any, *arguments: Any) -> Any:
        trained.append((task.model.gradient_checkpointing, task.flip_strength))
        return train_it(task, *arguments)

    monkeypatch.setattr(infinity, "train", watched)
    tiny_bits(((1, 1), (2, 2), (16, 16))).save_pretrained(work / "scenes")
    train = ["train", "--task", "infinity", "--data", "handwriting", "--scenes", 8, *SHAPE, "--output", work / "run"]
    run(*train, "--tokenizer", work / "scenes", "--text-encoder", "characters", "--flip-strength", 0)
    run(*train[:-1], work / "again", "--tokenizer", work / "scenes", "--text-encoder", "characters", *CHECKPOINTING)
    assert trained == [(False, 0), (True, 0.3)]
    assert Infinity.from_pretrained(work / "run/model").config.text_channels == 64


def test_public_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told what they are, sampled from and trained further."""
    net = tiny_infinity()
    net.tokenizer = tiny_bits(channels=32, norm_groups=32)
    torch.save(public_transformer(net), tmp_path / "infinity.pth")
    torch.save({"vae": public_tokenizer(net)}, tmp_path / "vae.pth")
    run("info", tmp_path / "infinity.pth")
    shown = capsys.readouterr().out
    assert "a public Infinity transformer, for fastvar.models.load_infinity" in shown
    assert "  depth 3, width 32, 2 heads, 8 bits a token\n  condition: texts of up to 6 rows of 12 channels" in shown
    model = ["--model", tmp_path / "infinity.pth"]
    sample = ["sample", *model, "--prompt", "ab", "--count", 1, "--output", tmp_path / "a.png", "--grids", "1,2,3"]
    assert "tokenizer: expected the file of the public tokenizer" in refused(capsys, *sample)
    sample += ["--tokenizer", tmp_path / "vae.pth"]
    assert "text_encoder: expected a name, as the model has none" in refused(capsys, *sample)
    run(*sample, "--text-encoder", "characters-12", "--dtype", "bfloat16")
    assert Image.open(tmp_path / "a.png").size == (10, 10)
    train = ["train", "--task", "infinity", "--start", tmp_path / "infinity.pth", "--tokenizer", tmp_path / "vae.pth"]
    write(tmp_path / "data/a.png", 128, 128)
    few = [*SHAPE[6:], "--data", tmp_path / "data", "--text-encoder", "characters-12", "--output", tmp_path / "run"]
    run(*train, *few, "--budget", "0.06M")
    saved = Infinity.from_pretrained(tmp_path / "run/model")
    assert saved.schedule == infinity_schedule("0.06M") and saved.config.text_encoder == "characters-12"


def test_what_does_not_go_together(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--data", work / "data", "--tokenizer", work / "bsq", *SHAPE, "--output", work / "run"]
    assert "train: budget: expected none with the task var" in refused(capsys, *train, "--budget", "1M")
    infinity = [*train, "--task", "infinity"]
    assert "train: subject: expected none with the task infinity" in refused(
        capsys, *infinity, "--subject", "bidirectional"
    )
    assert "text_encoder: expected a name" in refused(capsys, *infinity)
    assert "data: expected images of several sizes" in refused(
        capsys, *[*infinity, "--data", "handwriting", "--budget", "1M", "--text-encoder", "characters"]
    )
    (work / "data/2.txt").unlink()
    assert "2.png: 2.txt is missing" in refused(capsys, *infinity, "--text-encoder", "characters-12")
    run(*infinity, "--text-encoder", "characters-12", "--skip-bad")
    for given in ((), ("--labels", "a", "--prompt", "b")):
        assert "sample: labels, prompt: expected exactly one" in refused(
            capsys, "sample", "--model", work / "run", *given
        )
    assert "sample: grids: expected none with a subject" in refused(
        capsys,
        *["sample", "--model", work / "run", "--prompt", "b", "--subject", work / "data/0.png", "--grids", "1,2"],
    )
    for given in ((), ("--texts", work / "x", "--data", work / "data")):
        assert "encode-text: texts, data: expected exactly one" in refused(
            capsys, "encode-text", "--text-encoder", "characters", "--output", work / "texts", *given
        )
    var = VAR(
        VARConfig(tiny_tokenizer().config.grids, depth=1, embed_dim=8, num_heads=1, vocab_size=32, code_channels=8)
    )
    var.tokenizer = tiny_tokenizer()
    var.save_pretrained(work / "var")
    assert "sample: prompt: expected none, but labels" in refused(
        capsys, "sample", "--model", work / "var", "--prompt", "b"
    )
    for option, value in (
        ("grids", "1"),
        ("negative", "b"),
        ("dtype", "float32"),
        ("tokenizer", work / "bsq"),
        ("text_encoder", "characters"),
    ):
        assert f"sample: {option}: expected none with a VAR" in refused(
            capsys, "sample", "--model", work / "var", "--labels", "1", f"--{option.replace('_', '-')}", value
        )


def test_an_encoder_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "T5TextEncoder", CharacterTextEncoder)
    monkeypatch.setattr(CharacterTextEncoder, "name", "t5")
    monkeypatch.setattr(models, "load_text_encoder", lambda name: CharacterTextEncoder())
    (tmp_path / "t5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_encoder("t5").name == load_encoder(f"{tmp_path}/t5").name == f"{tmp_path}/t5"
