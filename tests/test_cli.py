"""The command line: help, one clear line for a mistake, and all commands once in small."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import textwrap
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import fastvar
from fastvar.builtin import REWARDS
from fastvar.cli import main
from fastvar.cli.build import Build
from fastvar.cli.common import chosen_device, train_on
from fastvar.cli.info import Info
from fastvar.cli.models import Sample, Train, TrainTokenizer
from fastvar.cli.reinforcement import RL, Ablate, ChooseMiddle, Evaluate, RewardOptions
from fastvar.cli.sources import DataOptions, PromptOptions
from fastvar.cli.texts import EncodeText
from fastvar.handwriting.demo import DemoConfig
from fastvar.models import VAR, SamplingOptions, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.models.injection import SUBJECTS
from fastvar.ops.policy_loss import KL_ESTIMATORS, NORMALISATIONS, PANW_NORMALISATIONS, RATIO_LEVELS
from fastvar.random import derive
from fastvar.rl import PolicyLossOptions, RLConfig
from fastvar.rl.config import TOLERANCES
from fastvar.rl.rewards.base import _REGISTRY
from fastvar.training import TrainConfig
from fastvar.training.interrupts import Interrupted
from tests.golden.golden import load_case
from tests.helpers.tiny import tiny_infinity, tiny_var

DATA = ["--data", "handwriting"]
COMMANDS = (
    *("train-tokenizer", "train", "encode-text", "sample", "evaluate", "latency", "demo", "info", "build"),
    *("rl", "choose-middle", "ablate", "recipe", "import"),
)
SMALL = ["--grids", "1,3x4,6x8", "--vocab-size", "16", "--code-channels", "8", "--channels", "8", "--norm-groups", "4"]
FEW = ["--steps", "3", "--batch-size", "4", "--scenes", "16", "--log-every", "1", *DATA]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: fastvar" in shown


def test_help_names_choices(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for command in ("rl", "train"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        shown[command] = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    own = [name for name, factory in _REGISTRY.items() if factory.__module__.startswith("fastvar.")]
    for name in (*own, *REWARDS):
        assert re.search(rf"There are [^.]*\b{name}\b", shown["rl"]), name
    for choices in (NORMALISATIONS, PANW_NORMALISATIONS, RATIO_LEVELS, KL_ESTIMATORS, TOLERANCES, ("own", "scene")):
        assert all(f'"{choice}"' in shown["rl"] for choice in choices)
    for choice in (*SUBJECTS, "no", "bf16", "auto", "handwriting", "own", "scene"):
        assert f'"{choice}"' in shown["train"], choice


@pytest.mark.parametrize(
    "config",
    [
        *(TrainTokenizer, Train, Sample, Evaluate, Info, Build, DemoConfig, TrainConfig, DataOptions),
        *(
            EncodeText,
            RL,
            ChooseMiddle,
            Ablate,
            RewardOptions,
            PromptOptions,
            RLConfig,
            PolicyLossOptions,
            SamplingOptions,
        ),
    ],
)
def test_every_option_is_documented(config: type) -> None:
    """tyro's help is the string below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "Flat" not in ast.unparse(statement.annotation):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            nested = ast.unparse(statement.annotation) in ("SamplingOptions", "PolicyLossOptions")
            assert documented or nested, f"{config.__name__}.{ast.unparse(statement.target)}"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    shown = capsys.readouterr().out
    assert "torch" in shown and "block_causal_attention" in shown
    run("info", "--markdown")
    assert capsys.readouterr().out.startswith("| operator |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "nowhere", "--labels", "1", "--device", "tpu"], "device: expected one of cpu"),
        (["sample", "--model", "x", "--labels", "1", "--output", "s1.xyz"], "whose name ends in .png, got s1.xyz"),
        (["sample", "--model", "x", "--labels", "1", "--output", "."], "output: expected a file, got the folder ."),
        (["sample", "--model", "x", "--labels", "1", "--output", "file/a.png"], "expected a folder, got the file file"),
        (["choose-middle", "--model", "x", "--output", "m.svg"], "whose name ends in .png, got m.svg"),
        (["choose-middle", "--model", "x", "--held-out", "jpeg"], "choose-middle: held_out: expected none, as nothing"),
        (["evaluate", "--model", "x", "--output", "."], "output: expected a file, got the folder ."),
        (["train", *DATA, "--output", "file", "--tokenizer", "x"], "output: expected a folder, got the file file"),
        (["train-tokenizer", *DATA, "--output", "file/run"], "output: expected a folder, got the file file"),
        (["rl", "--model", "x", "--output", "file"], "output: expected a folder, got the file file"),
        (["ablate", "--config", "x", "--output", "file"], "output: expected a folder, got the file file"),
        (["demo", "--output", "file"], "output: expected a folder, got the file file"),
        *(
            ([*command, "--device", "cuda:99"], "device: expected one of cpu")
            for command in (
                ["train-tokenizer", *DATA, "--output", "x"],
                ["train", *DATA, "--output", "x", "--tokenizer", "y"],
                ["rl", "--model", "x", "--output", "x"],
                ["demo", "--output", "x"],
                ["evaluate", "--model", "x"],
                ["choose-middle", "--model", "x"],
            )
        ),
        (["info", "nowhere"], "info: path: expected a file or a folder, got nowhere, which is none"),
        (["sample", "--model", "nowhere", "--labels", "1"], "model: expected a folder with config.json, got nowhere"),
        (["train-tokenizer", *DATA, "--output", "x", "--grids", "4,2"], "expected sides that never shrink"),
        (["train-tokenizer", *DATA, "--output", "x", "--grids", "four"], "expected a preset or grids"),
        (["train-tokenizer", "--output", "x", "--data", "nowhere"], "nowhere"),
        (["train", *DATA, "--output", "x", "--tokenizer", "nowhere"], "tokenizer: expected a folder with config.json"),
        (["train-tokenizer", *DATA, "--output", "x", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["train-tokenizer", *DATA, "--output", "x", "--norm-groups", "0"], "norm_groups: expected at least 1, got 0"),
        (["sample", "--model", "x", "--labels", "1", "--count", "0"], "count: expected at least 1, got 0"),
        (["evaluate", "--model", "x", "--samples", "0"], "samples: expected at least 8, got 0"),
        (["rl", "--model", "nowhere", "--output", "x"], "model: expected a folder with config.json, got nowhere"),
        (["rl", "--model", "x", "--output", "x", "--eta", "0"], "RLConfig: eta: expected above 0, got 0"),
        (["ablate", "--config", "nowhere.toml", "--output", "x"], "nowhere.toml"),
        (["rl", "--model", "x", "--output", "x", "--seed", "4294967296"], "RLConfig: seed: expected 0 to 2147483647"),
        (["sample", "--model", "x", "--labels", "1", "--guidance", "nan"], "SamplingOptions: guidance: expected"),
        (["evaluate", "--model", "x", "--temperature", "1e-40"], "SamplingOptions: temperature: expected"),
        (["demo", "--output", "x", "--samples", "1"], "samples: expected at least 8, got 1"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (
            Interrupted("SIGTERM", 7, Path("run/step-7")),
            143,
            "stopped by SIGTERM after step 7, saved in run/step-7;",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),  # of what has nothing to save
    ],
)
def test_interrupts_say_where_it_was_saved(
    raised: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Info) -> None:
        raise raised

    monkeypatch.setattr(Info, "run", stop)
    with pytest.raises(SystemExit) as stopped:
        run("info")
    shown = capsys.readouterr().err.splitlines()
    assert stopped.value.code == status and len(shown) == 1 and shown[0].startswith(f"fastvar: {line}")


def test_flags_that_messages_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one of the commands that the message is for."""
    for command, flags in {
        "train": ("--no-resume", "--precision", "--save-minutes", "--steps"),
        "train-tokenizer": ("--no-resume", "--precision"),
        "rl": ("--no-resume", "--precision", "--save-minutes", "--iterations"),
    }.items():
        with pytest.raises(SystemExit):
            run(command, "--help")
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in flags), command


def test_training_asks_for_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "--output", "x", "--tokenizer", "y"], ["train-tokenizer", "--output", "x"]):
        with pytest.raises(SystemExit) as stop:
            run(*command)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "--data STR" in error and '"handwriting"' in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out == f"fastvar {fastvar.__version__}\n"


def test_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Training is told by accelerate's variable; a GPU of its own is not for one of several processes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    train_on("cpu")
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert chosen_device(None) == torch.device("cuda") and chosen_device("cpu") == torch.device("cpu")
    train_on("cuda:1")
    train_on(None)
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"device: expected one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'"):
        train_on("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="device: expected cpu or cuda where several processes"):
        train_on("cuda:0")


def test_weights_follow_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    seeds: list[int] = []
    shape = {"grids": ((1, 1), (2, 2)), "vocab_size": 16, "code_channels": 8, "channels": 8, "norm_groups": 4}
    VQTokenizer(VQTokenizerConfig(**shape)).save_pretrained(tmp_path / "vq")  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(fastvar.training, "train", Mock(side_effect=Begun))
    var = ["--tokenizer", tmp_path / "vq", "--depth", "1", "--width", "16", "--heads", "2"]
    for command in (["train-tokenizer", *SMALL], ["train", *var]):
        seeds.clear()
        with pytest.raises(Begun):
            run(*command, "--output", tmp_path / "run", *FEW, "--seed", 7)
        assert seeds[-1] == derive(7, "weights")


def test_train_sample_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *FEW)
    shape = ["--depth", "1", "--width", "16", "--heads", "2"]
    train = ["train", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq", *shape, *FEW]
    with pytest.raises(SystemExit):
        run(*train, "--scale-weights", 1, 2)
    assert "scale_weights: expected 3 numbers, one for each scale, got 2" in capsys.readouterr().err
    run(*train, "--cache-tokens", "--label-smoothing", 0.1, "--scale-weights", 1, 1, 2.5)
    settings = json.loads((tmp_path / "var/settings.json").read_text())
    assert settings["loss"] == {"label_smoothing": 0.1, "scale_weights": [1.0, 1.0, 2.5]}
    run(
        "sample",
        "--model",
        tmp_path / "var/model",
        "--labels",
        "07",
        "42",
        "--count",
        "3",
        "--output",
        tmp_path / "a.png",
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 + 3 * (32 + 2), 2 + 2 * (24 + 2))
    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "var", "--samples", "8", "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(capsys.readouterr().out) == figures and figures["reading"]["images"] == 8
    assert {"ocr", "ocr_95", "diversity", "diversity_95"} <= set(figures["rewards"])
    run(
        *["train", "--output", tmp_path / "subject", "--tokenizer", tmp_path / "vq/model", *FEW],
        *["--start", tmp_path / "var/model", "--subject", "interleaved", "--subject-own-tokens"],
    )
    capsys.readouterr()
    run("info", tmp_path / "subject")
    assert ", subject interleaved of its own tokens" in capsys.readouterr().out
    run("evaluate", "--model", tmp_path / "subject/model", "--samples", "8")
    assert "subject_match" in capsys.readouterr().out
    run(
        *["sample", "--model", tmp_path / "subject/model", "--labels", "07", "--subject", tmp_path / "a.png"],
        *["--output", tmp_path / "b.png"],
    )
    assert (tmp_path / "b.png").is_file()
    with pytest.raises(SystemExit):
        run(
            *["sample", "--model", tmp_path / "subject/model", "--labels", "07", "--output", tmp_path / "c.png"],
            *["--subject", tmp_path / "subject/settings.json"],
        )
    error = capsys.readouterr().err
    assert "sample: subject: expected a readable image, got" in error and "settings.json" in error
    with pytest.raises(SystemExit):
        run("sample", "--model", tmp_path / "vq", "--labels", "07")
    assert f"model: from_pretrained: expected a VAR, got a VQTokenizer in {tmp_path}/vq/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("train", "--tokenizer", tmp_path / "var", "--output", tmp_path / "other", *FEW)
    error = capsys.readouterr().err
    assert f"tokenizer: from_pretrained: expected a VQTokenizer, got a VAR in {tmp_path}/var/model, which" in error
    assert f"which has its own in {tmp_path}/var/model/tokenizer" in error
    with pytest.raises(SystemExit):
        run("sample", "--model", tmp_path / "var/model", "--labels", "cat", "--output", tmp_path / "c.png")
    assert "expected texts of at most 2 characters out of '0123456789', got 'cat'" in capsys.readouterr().err


def test_reinforcement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts, subjects and classes; adapters; rewards with weights and options; the choice of m."""
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *FEW)
    shape = ["--depth", "1", "--width", "16", "--heads", "2", "--tokenizer", tmp_path / "vq/model", *FEW]
    run("train", "--output", tmp_path / "var", *shape, "--subject", "block_causal")
    few = ["--iterations", "4", "--prompts", "2", "--group-size", "2", "--middle", "1", "--prompt-count", "8"]
    start = ["--model", tmp_path / "var/model"]
    run(
        *["rl", *start, "--output", tmp_path / "rl", *few, "--adapter-rank", "2", "--kl-weight", "0.01"],
        *["--rewards", "jpeg=0.5", "colour", "--reward-options", "colour.channel=blue", "jpeg.larger=true"],
        *["--evaluate-every", "2", "--evaluation-samples", "8", "--held-out", "ocr"],
    )
    lines = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and {"reward/jpeg", "reward/colour", "evaluation/return"} <= set(lines[-1])
    assert "evaluation/held_out/ocr" in lines[-1] and "reward/ocr" not in lines[-1]
    assert json.loads((tmp_path / "rl/rewards.json").read_text())["ocr"]["weight"] is None
    run("evaluate", "--model", tmp_path / "rl/best", "--samples", "8")
    draws = ["--prefixes", "2", "--continuations", "2", "--rewards", "colour"]
    run("choose-middle", *start, *draws, "--output", tmp_path / "m.png")
    assert "<- recommended" in capsys.readouterr().out and (tmp_path / "m.png").is_file()
    for options, message in (
        (["--rewards", "beauty"], "create: name: expected one of"),
        (["--rewards", "jpeg=nan"], "rewards: expected finite weights, got jpeg=nan"),
        (["--rewards", "jpeg=0"], "RewardSum: weights: expected one other than 0, as nothing would be learned"),
        (["--rewards", "jpeg=much"], "rewards: expected NAME or NAME=WEIGHT, got 'jpeg=much'"),
        (["--held-out", "ocr"], "held_out: expected rewards that are not in rewards, got 'ocr'"),
        (["--held-out", "beauty"], "create: name: expected one of"),
        (
            ["--rewards", "jpeg", "--held-out", "ocr"],
            "RLConfig: evaluate_every: expected at least 1, as rewards are held",
        ),
        (["--reward-options", "jpeg.quality"], "reward_options: expected NAME.OPTION=VALUE"),
        (
            ["--rewards", "jpeg", "--reward-options", "jpeg.size=3"],
            "create: options of 'jpeg': got an unexpected keyword argument 'size'",
        ),
        (["--prompt-file", str(tmp_path / "nowhere.txt")], "nowhere.txt"),
    ):
        with pytest.raises(SystemExit):
            run("rl", *start, "--output", tmp_path / "bad", *few, *options)
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and "Traceback" not in error


def test_prompts_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with a class condition draws classes, and rewards read what the file says of them."""
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 24), (i * 40, 90, 20)).save(tmp_path / "photos" / label / f"{i}.png")
    few = [*FEW[:4], "--data", tmp_path / "photos"]
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *few)
    shape = ["--depth", "1", "--width", "16", "--heads", "2"]
    run("train", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq/model", *shape, *few)
    (tmp_path / "prompts.txt").write_text("a\ta first thing\n1\ta second one\n", encoding="utf-8-sig")
    few = ["--iterations", "2", "--prompts", "2", "--group-size", "2", "--middle", "0", "--rewards", "jpeg"]
    rl = ["rl", "--model", tmp_path / "var/model", "--output", tmp_path / "rl", *few]
    run(*rl, "--prompt-file", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("0\ta first thing\n", encoding="utf-16")
    with pytest.raises(SystemExit):
        run(*rl, "--prompt-file", tmp_path / "prompts.txt")
    assert "prompt_file: expected text in UTF-8, got" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("7\ta first thing\n")
    with pytest.raises(SystemExit):
        run(*rl, "--prompt-file", tmp_path / "prompts.txt")
    assert (
        "prompt_file: CLASS: expected one of 'a', 'b' or a class index from 0 to 1, got '7'" in capsys.readouterr().err
    )
    (tmp_path / "prompts.txt").write_text("a a first thing\n")
    with pytest.raises(SystemExit):
        run(*rl, "--prompt-file", tmp_path / "prompts.txt")
    assert "prompt_file: expected lines CLASS TAB PROMPT, got 'a a first thing'" in capsys.readouterr().err


def test_prompts_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets filtered for training and drawn for evaluations by their number of texts; prompts of words, others for
    evaluations; numbers by their digits; photos of a subject, each with every prompt."""
    var = tiny_var(num_classes=0, text_length=40, alphabet="".join(map(chr, range(32, 127))), subject="block_causal")
    lines = [f"{i} says {' '.join(f'{chr(34)}{k}{chr(34)}' for k in range(n))}" for n in range(1, 7) for i in range(9)]
    (tmp_path / "set.txt").write_text("\n".join(lines))
    shares = ("2=0.5", "4=0.5")
    options = PromptOptions(prompt_file=tmp_path / "set.txt", region_shares=shares)
    trained = options.load_prompts(var, count=100, train=True).texts
    assert trained == [*lines[9:18], *lines[27:36]]
    drawn = options.load_prompts(var, count=10, train=False).texts
    assert len(drawn) == 10 and sum(text in lines[9:18] for text in drawn) == 5 and set(drawn) < set(trained)
    (tmp_path / "words.txt").write_text(" ".join(f"w{i}" for i in range(20)))
    (tmp_path / "templates.txt").write_text("Say {}.\n")
    made = PromptOptions(
        prompt_words=tmp_path / "words.txt", prompt_templates=tmp_path / "templates.txt", region_shares=("1=1", "2=1")
    )
    ours, others = (made.load_prompts(var, count=10, train=train).texts for train in (True, False))
    assert len(ours) == len(others) == 10 and set(ours) != set(others) and all(t.startswith('Say "w') for t in ours)
    net = tiny_infinity()  # reads any text: nothing says how many digits
    assert PromptOptions(region_shares=("2=1",)).load_prompts(net, count=3, train=True).texts == ["00", "33", "66"]
    with pytest.raises(ValueError, match="prompt_file: expected a file, or --region-shares"):
        PromptOptions().load_prompts(net, count=3, train=True)
    for i in range(2):
        Image.new("RGB", (9, 9), (200 * i, 0, 0)).save(tmp_path / f"{i}.png")
    photos = PromptOptions(
        prompt_file=tmp_path / "set.txt", region_shares=shares, references=(tmp_path / "0.png", tmp_path / "1.png")
    )
    found = photos.load_prompts(var, count=10, train=True)
    assert found.texts[:4] == [trained[0]] * 2 + [trained[1]] * 2 and found.references is not None
    assert found.references[:4, 0, 0, 0].mul(255).round().tolist() == [0, 200, 0, 200]
    for wrong, message in (
        ({"region_shares": ("2",)}, "region_shares: expected REGIONS=SHARE, got '2'"),
        ({"region_shares": ("7=1",)}, "region_shares: expected regions from 1 to 6"),
        ({"region_shares": ("2=-1",)}, "region_shares: quotas: shares: expected numbers from 0 on"),
        ({"prompt_words": tmp_path / "words.txt"}, "prompt_words: expected none beside --prompt-file"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptOptions(prompt_file=tmp_path / "set.txt", **wrong).load_prompts(var, count=4, train=False)


def test_regions_of_other_images(tmp_path: Path) -> None:
    """Refused and not ignored."""
    (tmp_path / "subjects/cat/references").mkdir(parents=True)
    (tmp_path / "classes/cat").mkdir(parents=True)
    for place in ("subjects/cat/references", "subjects/cat", "classes/cat"):
        Image.new("RGB", (24, 24)).save(tmp_path / place / "0.png")
    (tmp_path / "subjects/cat/0.txt").write_text('a "sign"')
    for name in ("subjects", "classes"):
        plain, with_shares = (DataOptions(str(tmp_path / name), region_shares=shares) for shares in ((), ("2=1",)))
        assert len(plain.load((24, 24), train=True, seed=0)) == 1
        with pytest.raises(ValueError, match=f"region_shares: expected none, .*, got 2=1 with .*{name}"):
            with_shares.load((24, 24), train=True, seed=0)
    with pytest.raises(ValueError, match="region_shares: expected none"):
        DataOptions(str(tmp_path / "subjects"), region_shares=("2=1",)).load_with_texts([(24, 24)], seed=0)


def test_subjects_of_pairs(tmp_path: Path) -> None:
    """Trained on a list of targets and references, sampled with several photos, each in its turn."""
    lines = []
    for i in range(3):
        Image.new("RGB", (32, 24), (80 * i, 90, 20)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": f"cat {i}", "references": ["0.png", "1.png"]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *FEW)
    few = ["--steps", "2", "--batch-size", "2", "--data", tmp_path / "pairs.jsonl"]
    shape = ["--depth", "1", "--width", "16", "--heads", "2", "--subject", "block_causal", "--gate-init", "1"]
    run("train", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq", *shape, *few)
    config = VAR.from_pretrained(tmp_path / "var/model").config
    assert config.alphabet == " 012act" and config.text_length == 5 and config.gate_init == 1
    sample = ["sample", "--model", tmp_path / "var", "--labels", "cat 0", "cat", "--count", 3, "--output"]
    photos = [tmp_path / "0.png", tmp_path / "2.png"]
    both = drawn(tmp_path / "a.png", [*sample, tmp_path / "a.png", "--references", *photos])
    first, second = (drawn(tmp_path / "b.png", [*sample, tmp_path / "b.png", "--subject", photo]) for photo in photos)
    for row in range(2):
        assert both[row][0] == first[row][0] and both[row][1] == second[row][1] and both[row][2] == first[row][2]
    assert first[0][1] != second[0][1]


def test_numbers_of_several_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In given shares, in training and in evaluations, which are told apart by them."""
    shares = ["--region-shares", "1=0.5", "2=0.5"]
    run("train-tokenizer", "--output", tmp_path / "vq", *SMALL, *FEW)
    shape = ["--depth", "1", "--width", "16", "--heads", "2"]
    run("train", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq", *shape, *FEW, *shares, "--cache-tokens")
    data = json.loads((tmp_path / "var/settings.json").read_text())["data"]
    assert VAR.from_pretrained(tmp_path / "var/model").config.text_length == 2 and data["kind"] == "TokenDataset"
    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "var", "--samples", "12", *shares, "--rewards", "jpeg")
    figures = json.loads(capsys.readouterr().out)
    assert figures["reading"]["images"] == 12 and figures["reading_1"]["images"] == figures["reading_2"]["images"] == 6


def drawn(path: Path, command: list[object]) -> list[list[bytes]]:
    """The images of a grid of two rows of three."""
    run(*command)
    with Image.open(path) as picture:
        return [
            [picture.crop((2 + 34 * x, 2 + 26 * y, 34 + 34 * x, 26 + 26 * y)).tobytes() for x in range(3)]
            for y in range(2)
        ]


def test_public_weights_become_a_model(tmp_path: Path) -> None:
    case = load_case("var_tiny")
    torch.save(case.transformer, tmp_path / "var.pth")
    torch.save(case.tokenizer, tmp_path / "vae.pth")
    weights = ["--weights", tmp_path / "var.pth", "--tokenizer", tmp_path / "vae.pth"]
    run("import", *weights, "--output", tmp_path / "model")
    run("sample", "--model", tmp_path / "model", "--labels", "1", "--count", 1, "--output", tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 30), (60 * i, 10, 200)).save(tmp_path / "photos" / label / f"{i}.png")
    few = ["--steps", "2", "--batch-size", "4"]
    run("train-tokenizer", "--data", tmp_path / "photos", "--output", tmp_path / "vq", *SMALL, *few)
    train = ["train", "--data", tmp_path / "photos", "--output", tmp_path / "var", "--tokenizer", tmp_path / "vq/model"]
    run(*train, *few)
    assert capsys.readouterr().out.count(f"var: {tmp_path / 'var/model'} (2 steps") == 1
    monkeypatch.setenv("RANK", "1")  # the second of several processes says nothing
    run(*train, *few)
    assert "var: " not in capsys.readouterr().out
    sample = ["sample", "--model", tmp_path / "var/model", "--count", 2, "--output"]
    run(*sample, tmp_path / "a.png", "--labels", "b")
    run(*sample, tmp_path / "b.png", "--labels", 1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(SystemExit):
        run(*sample, tmp_path / "c.png", "--labels", "c")
    assert "sample: labels: expected one of 'a', 'b' or a class index from 0 to 1, got 'c'" in capsys.readouterr().err


def test_starting_from_a_model_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels are those of the names that the model has; a class that it does not have is refused."""
    for label in ("b", "c", "d"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (20, 30), (60, 10, 200)).save(tmp_path / "photos" / label / "1.png")
    shape = {"vocab_size": 16, "code_channels": 8}
    grids = ((1, 1), (2, 2))
    vq = VQTokenizer(VQTokenizerConfig(grids, channels=8, channel_multipliers=(1, 2), norm_groups=4, **shape))
    vq.save_pretrained(tmp_path / "vq")
    start = ["train", "--tokenizer", tmp_path / "vq", "--data", tmp_path / "photos", "--steps", 1, "--batch-size", 2]
    for number, names, message in (
        (3, ("b", "c", "e"), "out of 3 classes (b, c, e), got d"),
        (4, (), "train: start: expected a model of 3 classes, as "),
        (4, ("a", "d", "c", "b"), ""),
        (3, (), ""),
    ):
        config = VARConfig(grids, depth=1, embed_dim=8, num_heads=2, num_classes=number, class_names=names, **shape)
        VAR(config).save_pretrained(tmp_path / "start")
        run_it = [*start, "--start", tmp_path / "start", "--output", tmp_path / "run", "--no-resume"]
        if message:
            with pytest.raises(SystemExit):
                run(*run_it)
            assert message in capsys.readouterr().err
        else:
            run(*run_it)
            assert VAR.from_pretrained(tmp_path / "run/model").config.class_names == (names or ("b", "c", "d"))
    with pytest.raises(SystemExit):
        run("sample", "--model", tmp_path / "start", "--labels", 1)
    assert "model: expected a VAR that was saved with its tokenizer, got" in capsys.readouterr().err
