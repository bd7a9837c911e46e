"""Micro-batches of training by graphs, with the stand-in for CUDA's of tape.py: as without, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastvar.models import VAR, Infinity, SamplingOptions, TextFeatures, bitwise_loss, graphs, scale_weights
from fastvar.rl import PolicyLossOptions, Prompts, RLConfig, VMRGRPOTrainer, add_adapters
from fastvar.training import TrainConfig, VARTask, graphed, train
from fastvar.training.graphed import GraphedStep, Tensors, check_alone
from fastvar.training.log import read_metrics
from tests.helpers.policies import bitwise_policy
from tests.helpers.tape import Tape, recordings
from tests.helpers.tiny import some_bits, some_texts, some_tokens, tiny_infinity, tiny_var

Batches = Iterator[dict[str, torch.Tensor]]


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs on a CPU; the tapes recorded so far."""
    return recordings(monkeypatch)


def training_of(var: VAR) -> Callable[..., Tensors]:
    """A micro-batch of training, the key of its options aside."""
    task = VARTask(var)

    def run(*options: Any, **batch: torch.Tensor) -> Tensors:
        loss, logged = task.loss(var, batch)
        loss.backward()
        return {"loss": loss, **logged}

    return run


def batches(var: VAR, count: int = 6, rows: int = 4) -> Batches:
    for seed in range(count):
        found = {"tokens": some_tokens(var, rows, seed), "label": torch.arange(rows) % 5}
        if var.config.subject != "none":
            found["reference_tokens"] = some_tokens(var, rows // 2, seed + 50)
        yield {name: tensor.to(var.device) for name, tensor in found.items()}


def trained(var: VAR, step: Callable[..., Tensors], bf16: bool) -> list[torch.Tensor]:
    """All losses, gradients and weights of steps of two micro-batches."""
    optimizer = torch.optim.SGD(var.parameters(), lr=0.01)
    found: list[torch.Tensor] = []
    torch.manual_seed(7)
    for i, batch in enumerate(batches(var)):
        with torch.autocast(var.device.type, torch.bfloat16, enabled=bf16):
            found += step(**batch).values()
        if i % 2:
            found += [p.grad.clone() for p in var.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return [tensor.detach() for tensor in [*found, *(p.detach().clone() for p in var.parameters())]]


def same(found: list[torch.Tensor], expected: list[torch.Tensor], **bound: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(bound or {"rtol": 0, "atol": 0}))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("GraphedStep")]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a prefix": {"subject": "block_causal"},
    "an interleaved subject": {"train": True, "condition_dropout": 0.4, "subject": "interleaved"},
    "checkpointing": {"checkpointing": True},
    "checkpointing with a prefix": {"checkpointing": True, "subject": "block_causal"},
    "dropout": {"train": True, "drop_path": 0.4, "condition_dropout": 0.4, "subject": "block_causal"},
    "checkpointing in training": {"train": True, "checkpointing": True, "condition_dropout": 0.4},
    "bf16": {"bf16": True},
}


def both(case: dict[str, Any], device: str = "cpu") -> tuple[list[torch.Tensor], list[torch.Tensor], GraphedStep]:
    """With and without graphs."""
    case = dict(case)
    training, bf16, checkpointing = (case.pop(name, False) for name in ("train", "bf16", "checkpointing"))
    var = tiny_var(**case).to(device).train(training)
    var.gradient_checkpointing = checkpointing
    other = var.clone()
    step = GraphedStep(training_of(var), var)
    return trained(var, step, bf16), trained(other, training_of(other), bf16), step


@pytest.mark.parametrize("case", CASES)
def test_as_without(tapes: list[Tape], case: str, caplog: pytest.LogCaptureFixture) -> None:
    found, expected, _ = both(CASES[case])
    same(found, expected)
    assert len(tapes) == 1 and not said(caplog)


@pytest.mark.parametrize("fields", [{"drop_path": 0.4}, {}], ids=str)
def test_infinity(tapes: list[Tape], fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Lengths of texts are an option: each has a graph of its own."""
    net = tiny_infinity(depth=2, condition_dropout=0.4, **fields).train()
    net.gradient_checkpointing = not fields
    other = net.clone()
    bits = some_bits(net, 4)

    def training(net: Infinity) -> Callable[..., Tensors]:
        def run(lengths: tuple[int, ...], packed: torch.Tensor, inputs: torch.Tensor) -> Tensors:
            loss = bitwise_loss(
                net(TextFeatures(packed, lengths), inputs), bits, scale_weights(net.schedule, net.device)
            )
            loss.backward()
            return {"loss": loss}

        return run

    step, plain = GraphedStep(training(net), net), training(other)
    for i, lengths in enumerate([(3, 1, 6, 2), (2, 2, 2, 2)] * 3):
        tensors = {"packed": some_texts(lengths, seed=i).packed, "inputs": torch.randn(4, 13, 8)}
        losses = []
        for call in (step, plain):
            torch.manual_seed(i)
            losses.append(call(lengths, **tensors)["loss"].detach())
        assert torch.equal(*losses)
        same(*([p.grad for p in each.parameters() if p.grad is not None] for each in (net, other)))  # type: ignore[misc]
    assert len(tapes) == 2 and not said(caplog)


def test_kinds(tapes: list[Tape]) -> None:
    """Each is run, captured and replayed apart."""
    var = tiny_var(condition_dropout=0.0, depth=1)
    add_adapters(var, 2)
    var.requires_grad_(True)
    other = var.clone()
    step, plain = GraphedStep(training_of(var), var), training_of(other)

    def few() -> None:
        for batch in batches(var, 3):
            same(list(step(**batch).values()), [value.detach() for value in plain(**batch).values()])
        same(*([p.grad for p in each.parameters() if p.grad is not None] for each in (var, other)))  # type: ignore[misc]

    few()
    for count, change in enumerate(
        [
            lambda each: each.train(),
            lambda each: setattr(each, "gradient_checkpointing", True),
            lambda each: each.head.requires_grad_(False),
            lambda each: each.blocks[0].qkv.enable_adapters(False),
        ],
        2,
    ):
        change(var), change(other)
        few()
        assert len(tapes) == count
    batch = next(batches(var))
    calls = [
        lambda: step(**next(batches(var, rows=2))),
        lambda: step("an option", **batch),
        lambda: step(**{**batch, "label": batch["label"].int()}),
    ]
    for count, call in enumerate(calls, len(tapes) + 1):
        for _ in range(3):
            call()
        assert len(tapes) == count


def test_weights_and_gradients_that_move(tapes: list[Tape], caplog: pytest.LogCaptureFixture) -> None:
    var = tiny_var()
    other = var.clone()
    step, plain = GraphedStep(training_of(var), var), training_of(other)

    def few(captures: int) -> None:
        for batch in batches(var, 2):
            same(list(step(**batch).values()), [value.detach() for value in plain(**batch).values()])
        same(*([p.grad for p in each.parameters()] for each in (var, other)))  # type: ignore[arg-type]
        assert len(tapes) == captures

    few(1)
    for each in (var, other):
        each.load_state_dict({name: value + 0.01 for name, value in each.state_dict().items()})
    few(1)  # in place
    for each in (var, other):
        each.head.weight.data = each.head.weight.data + 0.01
    few(2)
    mine = [p.grad for p in var.parameters() if p.grad is not None]
    copies = [grad.clone() for grad in mine]
    for each in (var, other):
        each.zero_grad(set_to_none=True)
    few(3)
    same(mine, copies)
    for each in (var, other):
        each.head.bias.grad = torch.ones_like(each.head.bias)
    few(4)
    for _ in range(2):
        for each in (var, other):
            each.zero_grad(set_to_none=True)
        few(graphed.CAPTURES)
    assert said(caplog) == [f"GraphedStep: runs without CUDA graphs: {graphed.MOVED}"]


def hooked(var: VAR) -> None:
    var.head.register_forward_hook(lambda *arguments: None)


def hooked_backward(var: VAR) -> None:
    var.head.register_full_backward_hook(lambda *arguments: None)


def hooked_weight(var: VAR) -> None:
    var.head.weight.register_hook(lambda gradient: None)


def hooked_after(var: VAR) -> None:
    var.head.weight.register_post_accumulate_grad_hook(lambda weight: None)


def compiled(var: VAR) -> None:
    var.blocks[0].compile(backend="eager")


def recomputed_dropout(var: VAR) -> None:
    var.train().gradient_checkpointing = True
    var.blocks[1].drop_path = 0.1


class DistributedDataParallel(nn.Module):
    """By name alone."""


def wrapped(var: VAR) -> None:
    var.wrapped = DistributedDataParallel()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "no forward hooks, got some on a Linear"),
        (hooked_backward, "no backward hooks, got some on a Linear"),
        (hooked_weight, "no hooks on gradients, got some on a weight of a Linear"),
        (hooked_after, "no hooks on gradients, got some on a weight of a Linear"),
        (compiled, "a model that is not compiled, got a compiled Block"),
        (recomputed_dropout, "no dropout, got some in a Block: put the model in evaluation mode"),
        (wrapped, "one process, got a model wrapped for several (DDP)"),
    ],
)
def test_what_cannot_be_captured(
    tapes: list[Tape], change: Callable[[VAR], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs as it is and says why once."""
    var = tiny_var()
    change(var)
    step = GraphedStep(lambda **_: {"loss": torch.ones(())}, var)
    for batch in batches(var, 3):
        assert step(**batch)["loss"] == 1
    assert not tapes
    assert said(caplog) == [f"GraphedStep: runs without CUDA graphs: expected {why}"]


def test_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    found, expected, _ = both(CASES["plain"])
    same(found, expected)
    why = "expected a model on a GPU, got one on cpu"
    assert said(caplog) == [f"GraphedStep: runs without CUDA graphs: {why}"]


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After the run that precedes it: gradients are there once, and it is not tried again."""
    tried = []

    def capture(run: Callable[[], Any], *_: Any) -> Any:
        run()
        tried.append(run)
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "runs_on", lambda device: True)
    found, expected, _ = both(CASES["plain"])
    same(found, expected)
    assert len(tried) == 1
    message = "GraphedStep: runs without CUDA graphs: a capture failed: RuntimeError: no room"
    assert said(caplog) == [message]


def test_a_call_that_fails(tapes: list[Tape]) -> None:
    """Is no fault of the capture."""

    def fail(**_: Any) -> Any:
        raise ArithmeticError("it")

    var = tiny_var()
    step = GraphedStep(fail, var)
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="it"):
            step(**next(batches(var)))


def test_memory_of_many_kinds_is_bounded(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    var = tiny_var()
    step = GraphedStep(lambda option, x: {"x": x + option}, var)
    for _ in range(3):
        for option in range(3):
            assert step(option, x=torch.ones(1))["x"] == 1 + option
            assert len(step._graphs) <= 2


# -- the trainers ----------------------------------------------------------------------------------------------------


def redness(images: torch.Tensor, prompts: Any, references: Any) -> torch.Tensor:
    return 10 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def learned(output: Path, adapters: bool, infinity: bool = False, **settings: Any) -> tuple[VMRGRPOTrainer, list[Any]]:
    """What iterations measured, and the weights after them."""
    var: Any = bitwise_policy(subject="block_causal") if infinity else tiny_var(subject="block_causal", depth=1)
    if adapters:
        add_adapters(var, 2)
    options: dict[str, Any] = {"learning_rate": 1e-3, "updates": 2, "micro_batch": 4, "filter_groups": False}
    config = RLConfig(
        **{"prompts": 2, "group_size": 4, "middle": 1, "continuations": 1, **options, **settings},
        rollout=SamplingOptions(graphs=False),
    )
    references = torch.rand(2, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(1))
    prompts = Prompts(["a", "b"], None if infinity else torch.tensor([1, 2]), references)
    training = VMRGRPOTrainer(var, redness, prompts, config, output)  # type: ignore[arg-type]
    metrics = [training.iteration(number) for number in (0, 0, 3)]
    kept = [{n: v for n, v in line.items() if not n.startswith(("seconds", "memory"))} for line in metrics]
    return training, [kept, [p.detach().clone() for p in training.policy.parameters()]]


@pytest.mark.parametrize("infinity", [False, True])
@pytest.mark.parametrize(
    ("adapters", "settings"),
    [
        (False, {"loss": PolicyLossOptions(kl_weight=0.1), "gradient_checkpointing": True}),
        (True, {"loss": PolicyLossOptions(kl_weight=0.1, kl_estimator="k3"), "precision": "bf16"}),
    ],
)
def test_reinforcement_learning(
    tapes: list[Tape], tmp_path: Path, settings: Any, adapters: bool, infinity: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates on-policy and after, of coarse and fine segments, in two micro-batches."""
    _, (metrics, weights) = learned(tmp_path / "with", adapters, infinity, update_graphs=True, **settings)
    assert len(tapes) == 4 and not said(caplog)
    _, (expected, others) = learned(tmp_path / "without", adapters, infinity, **settings)
    assert metrics == expected
    same(weights, others)


class Numbers:
    """Twelve images' tokens and labels."""

    def __init__(self, var: VAR) -> None:
        self.tokens = some_tokens(var, 12)

    def __len__(self) -> int:
        return 12

    def batch(self, rows: list[int]) -> dict[str, Any]:
        return {"tokens": self.tokens[rows], "label": torch.tensor(rows) % 5, "name": [str(row) for row in rows]}


def losses_and_weights(output: Path, **settings: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Of a training run with dropout in two micro-batches."""
    var = tiny_var(drop_path=0.3)
    train(VARTask(var), Numbers(var), TrainConfig(steps=4, batch_size=4, accumulate=2, log_every=1, **settings), output)
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")], [p.detach() for p in var.parameters()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training(tapes: list[Tape], tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    losses, weights = losses_and_weights(tmp_path / "with", graphs=True, precision=precision)
    assert len(tapes) == 1 and not said(caplog)
    expected, others = losses_and_weights(tmp_path / "without", precision=precision)
    assert losses == expected and len(losses) == 4
    same(weights, others)
    assert len(tapes) == 1


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    check_alone("it", True, SimpleNamespace(distributed_type="NO"))
    check_alone("it", False, SimpleNamespace(distributed_type="FSDP"))
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: "MULTI_CPU"))
    expected = r"graphs: expected False in a run of several processes or with FSDP \(MULTI_CPU\), got True"
    with pytest.raises(ValueError, match=f"RLConfig: update_{expected}"):
        learned(tmp_path / "rl", False, update_graphs=True)
    var = tiny_var()
    with pytest.raises(ValueError, match=f"TrainConfig: {expected}"):
        train(VARTask(var), Numbers(var), TrainConfig(graphs=True), tmp_path / "train")


def test_a_task_without_tensors_is_refused(tmp_path: Path) -> None:
    class Task(VARTask):
        tensors = property()  # type: ignore[assignment]

    var = tiny_var()
    with pytest.raises(ValueError, match="TrainConfig: graphs: expected False, as Task has no `tensors`, got True"):
        train(Task(var), Numbers(var), TrainConfig(graphs=True), tmp_path)


# -- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each capture on a GPU."""
    found: list[None] = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *arguments: (capture(*arguments), found.append(None))[0])
    return found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16"])
def test_as_without_on_a_gpu(captured: list[None], case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Dropout draws the same numbers."""
    found, expected, step = both(CASES[case], "cuda")
    same(found, expected, **CLOSE)
    assert len(captured) == len(step._graphs) == 1 and not said(caplog)


@pytest.mark.gpu
@needs_gpu
def test_bf16_on_a_gpu(captured: list[None]) -> None:
    found, expected, _ = both({**CASES["bf16"], "subject": "block_causal"}, "cuda")
    same(found, expected, rtol=0.05, atol=0.02)
    assert len(captured) == 1


@pytest.mark.gpu
@needs_gpu
def test_a_replay_does_not_wait_for_the_gpu(captured: list[None]) -> None:
    var = tiny_var(subject="block_causal").cuda()
    step, given = GraphedStep(training_of(var), var), list(batches(var))
    for batch in given[:2]:
        step(**batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[2:]:
            step(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(captured) == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reinforcement_learning_on_a_gpu(
    captured: list[None], tmp_path: Path, adapters: bool, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rate is so small that the same images are drawn."""
    settings = {
        "loss": PolicyLossOptions(kl_weight=0.1),
        "gradient_checkpointing": checkpointing,
        "learning_rate": 1e-7,
    }
    training, (metrics, weights) = learned(tmp_path / "with", adapters, update_graphs=True, **settings)
    assert len(captured) == 4 and not said(caplog) and training.policy.device.type == "cuda"
    _, (expected, others) = learned(tmp_path / "without", adapters, **settings)
    for line, other in zip(metrics, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    same(weights, others, **CLOSE)


@pytest.mark.gpu
@needs_gpu
def test_training_on_a_gpu(captured: list[None], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses, weights = losses_and_weights(tmp_path / "with", graphs=True, learning_rate=1e-6)
    assert len(captured) == 1 and not said(caplog) and weights[0].is_cuda
    expected, others = losses_and_weights(tmp_path / "without", learning_rate=1e-6)
    assert losses == pytest.approx(expected, rel=1e-4)
    same(weights, others, **CLOSE)


@pytest.mark.gpu
@needs_gpu
def test_a_capture_that_fails_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """What waits for the GPU is run as it is; later graphs are none the worse for it."""
    var = tiny_var().cuda()
    other = var.clone()
    run = training_of(var)

    def waiting(**batch: torch.Tensor) -> Tensors:
        found = run(**batch)
        found["loss"].item()
        return found

    step = GraphedStep(waiting, var)
    same(trained(var, step, False), trained(other, training_of(other), False), **CLOSE)
    assert not step._graphs
    assert [message.split(": ")[2] for message in said(caplog)] == ["a capture failed"]
    found, expected, step = both(CASES["dropout"], "cuda")
    same(found, expected, **CLOSE)
    assert step._graphs
