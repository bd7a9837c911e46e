"""The training loop: exact resume, averaged weights, accumulation, clear errors."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastvar.handwriting import HandwritingScenes
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.random import derive
from fastvar.training import TokenDataset, TokenizerTask, TrainConfig, VARTask, train
from fastvar.training.checkpoints import Checkpoints, checkpoint_folder, load_moments, saved_steps
from fastvar.training.ema import EMA
from fastvar.training.interrupts import Interrupted as ToldToStop
from fastvar.training.log import RunLog, read_metrics
from fastvar.training.loop import launched_precision, parameter_groups

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = VQTokenizerConfig(
    grids=((1, 1), (2, 2), (4, 4)),
    vocab_size=16,
    code_channels=8,
    channels=8,
    channel_multipliers=(1, 1, 1),
    blocks_per_level=1,
    norm_groups=4,
    attention=False,
)
TRANSFORMER = VARConfig(
    grids=TOKENIZER.grids,
    depth=2,
    embed_dim=16,
    num_heads=2,
    vocab_size=16,
    code_channels=8,
    num_classes=0,
    text_length=1,
    subject="block_causal",
    drop_path=0.2,
)


def scenes() -> HandwritingScenes:
    return HandwritingScenes(length=24, size=(16, 16), digits=1)


def options(**changes: object) -> TrainConfig:
    settings: dict[str, object] = {"steps": 6, "batch_size": 4, "log_every": 1, "save_every": 1, "ema_decay": 0.9}
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tokenizer_task() -> TokenizerTask:
    torch.manual_seed(0)
    return TokenizerTask(VQTokenizer(TOKENIZER), scenes().batch([0, 1])["image"])


def var_task() -> VARTask:
    torch.manual_seed(0)
    return VARTask(VAR(TRANSFORMER, VQTokenizer(TOKENIZER)))


TASKS = {"tokenizer": tokenizer_task, "var": var_task}


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_resume_is_bit_equal(name: str, stop_after: int, tmp_path: Path) -> None:
    """Stopped within any step and resumed: the same losses and the same weights, optimizer and averages included."""
    straight = train(TASKS[name](), scenes(), options(), tmp_path / "straight")

    task = TASKS[name]()
    steps_begun, loss = 0, task.loss

    def interrupted(*args: object) -> object:
        nonlocal steps_begun
        steps_begun += 1
        if steps_begun > stop_after:
            raise Interrupted
        return loss(*args)  # type: ignore[arg-type]

    task.loss = interrupted  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        train(task, scenes(), options(), tmp_path / "resumed")
    resumed = train(TASKS[name](), scenes(), options(), tmp_path / "resumed")
    assert resumed.steps_run == 6 - stop_after
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


_KILLED = """
import sys; sys.path[:0] = [{root!r}]
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from tests.training.test_loop import *
torch.set_num_threads(1)
train(tokenizer_task(), scenes(), options(steps=400, save_every=3), Path({output!r}))
"""


def test_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment leaves whole checkpoints; the lines written again are the same."""
    output = tmp_path / "killed"
    code = _KILLED.format(root=str(ROOT), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(saved_steps(output)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = saved_steps(output)
    assert steps, "no checkpoint within two minutes"
    before = losses(output)
    torch.set_num_threads(1)
    goal = steps[-1] + 4
    # the learning rate follows the full schedule, so only the number of steps run is cut
    config = options(steps=400, save_every=3)
    task = tokenizer_task()
    done, loss = 0, task.loss

    def stop(*args: object) -> object:
        nonlocal done
        done += 1
        if steps[-1] + done > goal:
            raise Interrupted
        return loss(*args)  # type: ignore[arg-type]

    task.loss = stop  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        train(task, scenes(), config, output)
    after = losses(output)
    assert len(after) == goal
    shared = min(len(before), len(after))
    assert shared >= steps[-1] and after[:shared] == before[:shared]


def test_output_folder(tmp_path: Path) -> None:
    result = train(tokenizer_task(), scenes(), options(keep=2), tmp_path)
    assert saved_steps(tmp_path) == [5, 6]
    assert [p.name for p in result.pictures] == ["step-00000006.png"] and result.pictures[0].is_file()
    assert (tmp_path / "tensorboard").is_dir()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "reconstruction", "quantization", "codes_used", "gradient_norm", "learning_rate"} <= set(lines[0])
    saved = VQTokenizer.from_pretrained(str(tmp_path / "model"))
    for key, value in saved.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[key])


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(tokenizer_task(), scenes(), options(), tmp_path)
    second = train(tokenizer_task(), scenes(), options(), tmp_path)
    assert second.steps_run == 0
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])


def test_starting_anew_forgets_the_old_run(tmp_path: Path) -> None:
    train(tokenizer_task(), scenes(), options(steps=8), tmp_path)
    shorter = train(tokenizer_task(), scenes(), options(steps=3, resume=False), tmp_path)
    assert shorter.steps_run == 3 and saved_steps(tmp_path) == [2, 3]
    assert len(losses(tmp_path)) == 3


def test_seed_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    seeded = Mock(side_effect=Begun)
    monkeypatch.setattr("accelerate.utils.set_seed", seeded)
    with pytest.raises(Begun):
        train(tokenizer_task(), scenes(), options(seed=5), tmp_path)
    seeded.assert_called_once_with(derive(5, "training", 0))


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(tokenizer_task(), scenes(), options(), tmp_path)
    train(tokenizer_task(), scenes(), options(log_every=2, keep=1), tmp_path)  # these change no result
    with pytest.raises(ValueError, match=r"other settings \(train.learning_rate was 0.001, is 0.1; data.items was 24"):
        train(
            tokenizer_task(), HandwritingScenes(length=9, size=(16, 16), digits=1), options(learning_rate=0.1), tmp_path
        )
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["seeds"]  # begun when its seeds followed otherwise
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other settings \(seeds was None, is sha256\)"):
        train(tokenizer_task(), scenes(), options(), tmp_path)
    for damaged in ('{"train": {', "[1]"):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"train: output: .*settings\.json: damaged file"):
            train(tokenizer_task(), scenes(), options(), tmp_path)


@pytest.fixture
def _sigint_is_not_ignored() -> Iterator[None]:
    """As it is where tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint_is_not_ignored")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_finishes_the_step_and_saves(name: str, tmp_path: Path) -> None:
    """And what goes on from there is what would have been."""
    straight = train(tokenizer_task(), scenes(), options(save_every=100), tmp_path / "straight")
    task = tokenizer_task()
    loss, begun = task.loss, 0

    def told(*args: object) -> object:
        nonlocal begun
        begun += 1
        if begun == 3:
            os.kill(os.getpid(), signal.Signals[name])
        return loss(*args)  # type: ignore[arg-type]

    task.loss = told  # type: ignore[method-assign,assignment]
    with pytest.raises(ToldToStop, match=rf"stopped by {name} after step 3, saved in .*step-00000003; ") as error:
        train(task, scenes(), options(save_every=100), tmp_path / "stopped")
    assert error.value.exit_status == 128 + signal.Signals[name]
    assert saved_steps(tmp_path / "stopped") == [3] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = train(tokenizer_task(), scenes(), options(save_every=100), tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self: self.average.updates in (2, 3))
    train(tokenizer_task(), scenes(), options(save_every=100, keep=9), tmp_path)
    assert saved_steps(tmp_path) == [2, 3, 6] and TrainConfig().save_minutes == 5


def test_going_on_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the last step on the learning rate is that of a run of so many steps; the settings tell of it."""
    train(tokenizer_task(), scenes(), options(steps=4), tmp_path)
    longer = train(tokenizer_task(), scenes(), options(steps=8), tmp_path)
    assert longer.steps_run == 4 and "goes on from step 4 to 8 instead of 4" in capsys.readouterr().err
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    expected = [options(steps=4).learning_rate_at(i) for i in range(4)]
    expected += [options(steps=8).learning_rate_at(i) for i in range(4, 8)]
    assert rates == pytest.approx(expected)
    lengths = json.loads((tmp_path / "settings.json").read_text())["lengths"]
    assert lengths == [{"from": 0, "steps": 4}, {"from": 4, "steps": 8}]
    with pytest.raises(ValueError, match=r"train: steps: expected at least 8, .*, got 6; .* with --no-resume"):
        train(tokenizer_task(), scenes(), options(steps=6), tmp_path)


def test_broken_checkpoint_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = train(tokenizer_task(), scenes(), options(), tmp_path)
    (checkpoint_folder(tmp_path, 6) / "state.json").unlink()
    resumed = train(tokenizer_task(), scenes(), options(), tmp_path)
    assert "step-00000006: state.json is missing: going on from" in capsys.readouterr().err
    assert resumed.steps_run == 1 and len(losses(tmp_path)) == 6
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_folder_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything of the other run is removed."""
    train(tokenizer_task(), scenes(), options(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}

    def taken(*arguments: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(ValueError, match=r"train: output: .* is in use by another process"):
        train(tokenizer_task(), scenes(), options(resume=False), tmp_path)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("launched", "asked", "found"),
    [("no", "bf16", "bf16"), ("bf16", "bf16", "bf16"), ("bf16", "auto", "bf16"), ("no", "auto", "auto")],
)
def test_precision_of_accelerate_launch(launched: str, asked: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert launched_precision(asked) == found


@pytest.mark.parametrize(("launched", "asked"), [("bf16", "no"), ("fp16", "no"), ("fp8", "auto"), ("fp16", "bf16")])
def test_another_precision_of_accelerate_launch_is_refused(
    launched: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=rf"train: precision: .*--mixed_precision .* got {launched} there, {asked}"):
        train(tokenizer_task(), scenes(), options(precision=asked), tmp_path)
    assert not list(tmp_path.iterdir())


def test_trained_var_has_its_tokenizer(tmp_path: Path) -> None:
    """Also when the run was finished before and is only loaded again."""
    for _ in range(2):
        model = train(var_task(), scenes(), options(steps=1), tmp_path).model
        assert model.generate(["3"], decode=True).images.shape == (1, 3, 16, 16)
        assert VAR.from_pretrained(str(tmp_path / "model")).tokenizer.config == TOKENIZER


def test_resume_with_a_data_loader(tmp_path: Path) -> None:
    """A data set without `batch`: the loader must not draw from the random state that dropout uses."""

    class Items:
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> dict[str, object]:
            return scenes()[index]

    straight = train(var_task(), Items(), options(steps=4), tmp_path / "straight")
    task = var_task()
    begun, loss = 0, task.loss

    def interrupted(*args: object) -> object:
        nonlocal begun
        begun += 1
        if begun > 2:
            raise Interrupted
        return loss(*args)  # type: ignore[arg-type]

    task.loss = interrupted  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        train(task, Items(), options(steps=4), tmp_path / "resumed")
    train(var_task(), Items(), options(steps=4), tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(straight.output)


def test_bf16_does_not_change_the_tokens(tmp_path: Path) -> None:
    ahead = TokenDataset(scenes(), var_task().model.tokenizer, reference=True)
    by_image = train(var_task(), scenes(), options(steps=2, precision="bf16"), tmp_path / "images")
    by_token = train(var_task(), ahead, options(steps=2, precision="bf16"), tmp_path / "tokens")
    assert losses(by_image.output) == losses(by_token.output)


def test_accumulation_gives_the_same_gradients(tmp_path: Path) -> None:
    whole = train(tokenizer_task(), scenes(), options(steps=2), tmp_path / "whole")
    parts = train(tokenizer_task(), scenes(), options(steps=2, accumulate=4), tmp_path / "parts")
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, parts.model.state_dict()[key], rtol=1e-3, atol=1e-4)
    for name in ("loss", "gradient_norm"):  # Adam would not see another scale
        first, second = (read_metrics(run.output / "metrics.jsonl")[0][name] for run in (whole, parts))
        assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_what_the_optimizer_is_given(clip_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped gradients, and the settings of its groups in every step."""
    given: list[tuple[float, list[tuple[Any, ...]]]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any, **more: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        groups = [(group["weight_decay"], group["betas"], group["lr"]) for group in self.param_groups]
        given.append((float(torch.nn.utils.get_total_norm(gradients)), groups))
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = options(steps=3, clip_norm=clip_norm, weight_decay=0.3, betas=(0.5, 0.6), learning_rate=0.01)
    train(tokenizer_task(), scenes(), config, tmp_path)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert len(given) == len(found) == 3
    for number, ((norm, groups), line) in enumerate(zip(given, found, strict=True)):
        rate = config.learning_rate_at(number)
        assert norm == pytest.approx(min(line["gradient_norm"], clip_norm), rel=1e-3) and line["gradient_norm"] > 0.01
        assert groups == [(0.3, (0.5, 0.6), rate), (0.0, (0.5, 0.6), rate)]
        assert line["learning_rate"] == pytest.approx(rate)


def test_seed_decides_the_order(tmp_path: Path) -> None:
    """Nothing in this task is drawn at random but the batches."""
    found = [
        losses(train(tokenizer_task(), scenes(), options(steps=1, seed=s), tmp_path / str(s)).output) for s in (0, 1)
    ]
    assert found[0] != found[1]


def test_bf16_computes_in_bf16(tmp_path: Path) -> None:
    task = tokenizer_task()
    seen, loss = [], task.loss

    def watched(model: Any, batch: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(model, batch)

    task.loss = watched  # type: ignore[method-assign]
    train(task, scenes(), options(steps=1, precision="bf16"), tmp_path / "bf16")
    train(task, scenes(), options(steps=1), tmp_path / "float32")
    assert seen == [True, False]


def test_without_decay_the_average_is_the_model(tmp_path: Path) -> None:
    task = tokenizer_task()
    averaged = train(task, scenes(), options(steps=2, ema_decay=0.0), tmp_path).model
    assert all(torch.equal(value, task.model.state_dict()[key]) for key, value in averaged.state_dict().items())


def test_tokens_ahead_are_the_tokens_of_the_images(tmp_path: Path) -> None:
    ahead = TokenDataset(scenes(), var_task().model.tokenizer, reference=True, batch_size=7)
    by_image = train(var_task(), scenes(), options(steps=2), tmp_path / "images")
    by_token = train(var_task(), ahead, options(steps=2), tmp_path / "tokens")
    assert losses(by_image.output) == losses(by_token.output)


def test_a_model_whose_copies_stay_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VQTokenizer, "clone", lambda self: copy.deepcopy(self))  # its `clone` takes no device
    assert losses(train(tokenizer_task(), scenes(), options(steps=1), tmp_path).output)


def test_average_is_apart_from_the_weights() -> None:
    model = VQTokenizer(TOKENIZER)
    ema = EMA(model, 0.9)
    before = {k: v.clone() for k, v in ema.model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in ema.model.state_dict().items())
    ema.update(model)  # the first update has decay 0.1
    torch.testing.assert_close(ema.model.codebook, before["codebook"] + 0.9)
    ema.decay = 0.15  # below the 2 / 11 of the second one
    ema.update(model)
    torch.testing.assert_close(ema.model.codebook, before["codebook"] + 1 - 0.1 * 0.15)
    with pytest.raises(ValueError, match="EMA: decay"):
        EMA(model, 1.0)


def test_weight_decay_spares_embeddings_and_vectors() -> None:
    model = VAR(TRANSFORMER)
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in model.named_parameters() if n.endswith("weight") and "scale_embed" not in n
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names) and plain["weight_decay"] == 0
    with pytest.raises(ValueError, match="require a gradient, got none"):
        parameter_groups(model.requires_grad_(False), 0.1)


def test_learning_rate() -> None:
    config = options(steps=100, learning_rate=2.0, warmup=0.1, final_learning_rate=0.1)
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(9) == config.learning_rate_at(10) == pytest.approx(2.0)
    assert config.learning_rate_at(55) == pytest.approx(1.1)
    assert config.learning_rate_at(99) == pytest.approx(0.2, abs=1e-2)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("accumulate", 3), ("precision", "fp8"), ("learning_rate", 0.0), ("keep", 0)]
)
def test_bad_settings(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {name}: expected .*, got {value!r}"):
        options(**{name: value}).check()


def test_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    task = tokenizer_task()
    with torch.no_grad():
        task.model.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="tokenizer: at step 1 the loss is nan"):
        train(task, scenes(), options(), tmp_path)
    assert not saved_steps(tmp_path)


def test_a_full_disk_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(OSError, match=r"train: output: expected \d+ MiB of free space in .* for a checkpoint, got 0"):
        train(tokenizer_task(), scenes(), options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    """Also where the loss itself is finite: neither weights nor checkpoint may take it."""
    task = tokenizer_task()
    task.model.codebook.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RuntimeError, match="its gradient's norm nan"):
        train(task, scenes(), options(), tmp_path)
    assert not saved_steps(tmp_path)
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_log_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if a project is named; an interrupted run goes on under the same identity."""
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finished")

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for first_step in (0, 0, 1, 0):
        log = RunLog(tmp_path, first_step, 2, title="run", shown=("loss",))
        log.write(1, {"loss": 2.0, "other": 3.0})
        log.close()
        monkeypatch.setenv("WANDB_PROJECT", "digits")
    first, *rest = calls
    assert first["resume"] == "allow" and rest[:2] == [(1, {"loss": 2.0, "other": 3.0}), "finished"]
    assert rest[2] == first  # resumed
    assert rest[5]["id"] != first["id"]  # begun anew


def test_moments_get_the_layout_of_their_parameters() -> None:
    """A run whose tokenizer was not yet channels-last goes on as if it had been."""
    weights = []
    for contiguous in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(3):
            weight.grad = torch.randn(weight.shape).to(memory_format=torch.channels_last)
            optimizer.step()
            if step == 1 and contiguous:
                state = optimizer.state[weight]
                state.update({name: value.contiguous() for name, value in state.items()})
                load_moments(optimizer, {f"0.{name}": value for name, value in state.items()})
        weights.append(weight.detach())
    assert torch.equal(*weights)
