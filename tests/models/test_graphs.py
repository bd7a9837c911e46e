"""Sampling by graphs, with a stand-in for CUDA's, see `Tape`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_memory
from benchmarks.suites import generate as suite
from fastvar.models import VAR, Generation, clear_graphs, graphs
from fastvar.models.sampling import Beginning, ScaleOptions
from fastvar.rl.adapters import add_adapters, without_adapters
from fastvar.schedule import ScaleSchedule
from tests.helpers.tape import GROWN, Tape, recordings
from tests.helpers.tiny import some_bits, some_subjects, some_texts, tiny_infinity, tiny_var
from tests.models.test_var_sampling import LABELS, SETTINGS

generate = VAR.generate
without = partial(generate, graphs=False)
OPTIONS = ScaleOptions((0.0,) * 3, (1.0,) * 3, (0,) * 3, (1.0,) * 3, False, 3, True, None, None)


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs on a CPU; the tapes recorded so far."""
    tapes = recordings(monkeypatch)
    monkeypatch.setattr(graphs, "room", lambda device: 10**6)
    monkeypatch.setattr(graphs, "total_memory", lambda device: 10**9)
    return tapes


def same(one: Generation, other: Generation) -> None:
    assert torch.equal(one.tokens, other.tokens)
    for name in ("images", "log_probs", "sampled_log_probs"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("subject", ["none", "block_causal", "interleaved"])
def test_as_without(captures: list[Tape], settings: str, subject: str) -> None:
    """Other labels, seeds and subjects than those captured."""
    var = tiny_var(subject=subject)
    options = {**SETTINGS[settings], "log_probs": True}
    for seed in range(3):
        labels = (LABELS + seed) % 5
        shared = None if subject == "none" else some_subjects(var, 2, seed)
        arguments = {"subject": shared, "seed": seed, **options}
        same(generate(var, labels, graphs=True, **arguments), without(var, labels, **arguments))
    assert len(captures) == 1


INFINITY: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": [3.0, 1.0, 2.0], "temperature": [1.0, 0.5, 2.0], "top_p": 0.9},
    "guided hidden states": {"guidance": 3.0, "guidance_layer": 1, "negative": some_texts((1, 2, 6, 3))},
    "another schedule": {"schedule": ScaleSchedule(((1, 1), (1, 2), (2, 5))), "decode_tile": 2},
    "subject": {"guidance": 2.0},
}


@pytest.mark.parametrize("settings", INFINITY)
def test_infinity_as_without(captures: list[Tape], settings: str) -> None:
    """Other texts, of other lengths, other seeds and subjects than those captured."""
    net = tiny_infinity(subject="block_causal")
    options = {**INFINITY[settings], "log_probs": True}
    for seed in range(3):
        if settings == "subject":
            options["subject"] = net.tokenizer.pyramid(some_bits(net, 2, seed))
        texts = some_texts(seed=seed)
        found = net.generate(texts, graphs=True, seed=seed, **options)
        same(found, net.generate(texts, graphs=False, seed=seed, **options))
    assert len(captures) == 1
    texts = some_texts((2, 1, 6, 5))
    same(net.generate(texts, graphs=True, **options), net.generate(texts, graphs=False, **options))
    assert len(captures) == 1


def test_infinity_goes_on_from_a_state(captures: list[Tape]) -> None:
    """And unasked, from the second call of a kind on."""
    net = tiny_infinity(subject="block_causal")
    subject = net.tokenizer.pyramid(some_bits(net, 2))
    options: dict[str, Any] = {"guidance": 2.0, "log_probs": True}

    def run(graphs: bool | None, seed: int) -> list[Generation]:
        found = net.generate(some_texts(), subject=subject, stop=1, decode=False, graphs=graphs, seed=seed, **options)
        ends = net.generate(state=found.state.fork(2), graphs=graphs, seed=seed + 1, **options)
        on = net.generate(state=found.state, stop=2, decode=False, graphs=graphs, **options)
        return [found, ends, on, net.generate(state=on.state, graphs=graphs, **options)]

    for call, expected in enumerate((0, 4, 4)):
        for one, other in zip(run(None, call), run(False, call), strict=True):
            same(one, other)
        assert len(captures) == expected


def test_results_do_not_change_afterwards() -> None:
    var = tiny_var()
    first = generate(var, LABELS, graphs=True, stop=2, decode=False)
    tokens, keys = first.tokens.clone(), first.state.cache.keys.clone()
    generate(var, LABELS, graphs=True, stop=2, decode=False, seed=5)
    assert torch.equal(first.tokens, tokens) and torch.equal(first.state.cache.keys, keys)


def test_forks_and_continuations(captures: list[Tape]) -> None:
    var = tiny_var(subject="block_causal")
    arguments: dict[str, Any] = {"subject": some_subjects(var, 2), "guidance": 1.0, "log_probs": True}

    def run(graphs: bool, seed: int) -> list[Generation]:
        found = generate(var, LABELS, stop=1, decode=False, graphs=graphs, seed=seed, **arguments)
        forked = found.state.fork(2)
        ends = generate(var, state=forked, guidance=1.0, log_probs=True, graphs=graphs, seed=seed + 1)
        on = generate(var, state=found.state, guidance=1.0, log_probs=True, stop=2, decode=False, graphs=graphs)
        last = generate(var, state=on.state, guidance=1.0, log_probs=True, graphs=graphs)
        return [found, ends, on, last]

    for seed in (0, 7):
        for one, other in zip(run(True, seed), run(False, seed), strict=True):
            same(one, other)
    assert len(captures) == 4


def test_follows_the_weights(captures: list[Tape]) -> None:
    """A step changes them in place; a model whose weights moved is captured again."""
    var = tiny_var()
    generate(var, LABELS, graphs=True)
    with torch.no_grad():
        var.head.bias.add_(torch.randn(var.head.bias.shape))
    same(generate(var, LABELS, graphs=True), without(var, LABELS))
    assert len(captures) == 1
    var.head.bias = torch.nn.Parameter(torch.randn(var.head.bias.shape))
    same(generate(var, LABELS, graphs=True), without(var, LABELS))
    assert len(captures) == 2


def test_what_is_captured_apart_and_forgotten(captures: list[Tape]) -> None:
    var = tiny_var()
    for options in ({}, {"top_k": 3}, {"guidance": 1.0}, {"stop": 2, "decode": False}, {}):
        generate(var, LABELS, graphs=True, **options)
    generate(var, LABELS[:2], graphs=True)
    assert len(captures) == 5
    clear_graphs(var)
    generate(var, LABELS, graphs=True)
    assert len(captures) == 6
    for top_k in range(1, graphs.KEPT + 2):
        generate(var, LABELS, graphs=True, top_k=top_k)
    before = len(captures)
    generate(var, LABELS, graphs=True)  # the oldest is gone
    assert len(captures) == before + 1


def test_unasked_from_the_second_call_on(captures: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the labels and seeds; a call of another kind has a first time of its own."""
    var = tiny_var(subject="block_causal")
    for call in range(4):
        arguments: dict[str, Any] = {"subject": some_subjects(var, 2, call), "seed": call, "first_sample": call}
        same(generate(var, (LABELS + call) % 5, **arguments), without(var, (LABELS + call) % 5, **arguments))
        assert len(captures) == min(call, 1)
    for call in range(3):
        generate(var, LABELS, seed=call)
        assert len(captures) == 1 + min(call, 1)
    expected = without(var, LABELS)
    monkeypatch.setattr("fastvar.models.sampling.draw", None)  # nothing runs but the graph
    same(generate(var, LABELS), expected)


def test_large_images_are_decoded_after_the_graph(captures: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    var, decoded = tiny_var(), []
    decode = var.tokenizer.decode_features
    monkeypatch.setattr(var.tokenizer, "decode_features", lambda *a, **k: (decoded.append(1), decode(*a, **k))[1])
    generate(var, LABELS, graphs=True)
    before = len(decoded)
    same(generate(var, LABELS, graphs=True, seed=1), without(var, LABELS, seed=1))
    assert len(decoded) == before + 1, "by the call without a graph"
    monkeypatch.setattr("fastvar.models.sampling.DECODED_AT_ONCE", 4 * 36 - 1)
    for _ in range(2):
        before = len(decoded)
        same(generate(var, LABELS, graphs=True, seed=1), without(var, LABELS, seed=1))
        assert len(decoded) == before + 2
    assert len(captures) == 2


def test_where_nothing_can_be_captured(
    captures: list[Tape], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unasked, calls do without, which is logged once; asked, they say why not."""

    def refused(expected: str) -> None:
        caplog.clear()
        for seed in range(3):
            same(generate(var, LABELS, seed=seed), without(var, LABELS, seed=seed))
        (said,) = [record.getMessage() for record in caplog.records if record.name == "fastvar"]
        assert said.startswith(f"generate: runs without CUDA graphs: expected {expected}")
        with pytest.raises(ValueError, match=rf"^generate: graphs: expected {expected}"):
            generate(var, LABELS, graphs=True)
        assert not captures

    var = tiny_var(drop_path=0.0)
    hook = var.blocks[0].proj.register_forward_hook(lambda module, inputs, output: output)
    refused("no forward hooks, got some on a Linear")
    hook.remove()
    var.blocks[0].mlp_in.compile(backend="eager")
    refused("a model that is not compiled, got a compiled Linear")
    var = tiny_var()
    with Tape():
        refused("a plain call, got one under torch.compile or a dispatch mode")
    monkeypatch.setattr("fastvar.ops._checks.DEBUG", True)
    refused("FASTVAR_DEBUG to be off")
    monkeypatch.undo()
    caplog.clear()
    generate(var, LABELS)
    assert not caplog.records, "on a CPU nobody expects them"
    monkeypatch.setattr(graphs, "runs_on", lambda device: True)
    var = tiny_var(drop_path=0.5).train()
    with pytest.raises(ValueError, match=r"^generate: graphs: expected no dropout, got some in a Block"):
        generate(var, LABELS, graphs=True)


def test_memory_is_bounded(
    captures: list[Tape], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tiny_var(), tiny_var(seed=1)
    kept = graphs._CAPTURED

    def ask(var: VAR, batch: int) -> None:
        for _ in range(2):
            generate(var, LABELS[:batch])

    estimate = graphs.needed
    monkeypatch.setattr(graphs, "needed", lambda *arguments: GROWN)
    monkeypatch.setattr(graphs, "total_memory", lambda device: 2 * (GROWN + 200) / graphs.MEMORY)
    ask(first, 1)
    ask(second, 1)
    assert len(kept[first].by_key) == len(kept[second].by_key) == 1
    assert kept[first].nbytes == GROWN + 8 + 8, "a label and a seed"
    ask(second, 2)  # too much for three: those of the model that was used last stay
    assert not kept[first].by_key and len(kept[second].by_key) == 2 and kept[first].nbytes == 0
    assert not caplog.records
    ask(second, 3)  # too much for one model's: all are freed
    assert not kept[second].by_key and kept[second].nbytes == 0 and len(captures) == 4
    generate(second, LABELS[:3])  # the kind that was too much is not captured again
    assert len(captures) == 4 and [record.getMessage() for record in caplog.records] == [f"generate: {graphs.TOO_MUCH}"]
    generate(second, LABELS[:1])  # the others are
    assert len(captures) == 5 and len(kept[second].by_key) == 1

    monkeypatch.setattr(graphs, "total_memory", lambda device: GROWN / graphs.MEMORY)
    clear_graphs(second)
    ask(second, 1)  # alone too large: not a second time
    ask(second, 1)
    assert len(captures) == 6 and not kept[second].by_key
    generate(second, LABELS[:1], graphs=True)  # unless it is asked for
    assert len(captures) == 7 and len(kept[second].by_key) == 1

    monkeypatch.setattr(graphs, "total_memory", lambda device: 10**9)
    monkeypatch.setattr(graphs, "needed", estimate)
    var = tiny_var()
    needed = graphs.needed(var, Beginning(LABELS, 4, var.schedule, None, False, False), OPTIONS)
    assert needed > 2 * 2 * 4 * 14 * 32 * 4, "at least keys and values"
    monkeypatch.setattr(graphs, "room", lambda device: needed - 1)
    caplog.clear()
    ask(var, 4)
    ask(var, 4)
    assert not kept[var].by_key and [record.getMessage() for record in caplog.records] == [
        f"generate: {graphs.TOO_MUCH}"
    ]
    monkeypatch.setattr(graphs, "room", lambda device: needed)
    ask(var, 4)
    assert len(kept[var].by_key) == 1


def test_others_are_freed_before_a_capture(captures: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, seen = tiny_var(), tiny_var(seed=1), []
    monkeypatch.setattr(graphs, "needed", lambda *arguments: GROWN)
    monkeypatch.setattr(graphs, "total_memory", lambda device: 1.5 * GROWN / graphs.MEMORY)
    generate(first, LABELS, graphs=True)
    assert graphs.held()[id(first)] == (GROWN + 2 * LABELS.nbytes, 1), "labels and seeds"
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *a: (seen.append(graphs.held()[id(first)].nbytes), capture(*a))[1])
    generate(second, LABELS, graphs=True)
    assert seen == [0]


def test_kinds_that_drive_out_each_other(captures: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of a model, or two models, that do not fit the budget together, in turns: one of them stays."""
    monkeypatch.setattr(graphs, "needed", lambda *arguments: GROWN)
    monkeypatch.setattr(graphs, "total_memory", lambda device: 1.5 * GROWN / graphs.MEMORY)
    for calls in (
        [(tiny_var(), 1), (tiny_var(seed=1), 1)],
        [(var := tiny_var(), 1), (var, 2)],
    ):
        before = len(captures)
        for turn in range(20):
            var, batch = calls[turn % 2]
            same(generate(var, LABELS[:batch], seed=turn), without(var, LABELS[:batch], seed=turn))
        assert len(captures) - before <= 2 * graphs.CAPTURES
        assert sum(len(graphs._CAPTURED[var].by_key) for var in {var for var, _ in calls}) == 1
        for var, _ in calls:
            clear_graphs(var)
    before, var = len(captures), tiny_var()
    monkeypatch.setattr(graphs, "total_memory", lambda device: 10**9)
    for _ in range(5):
        for top_k in range(1, graphs.KEPT + 2):
            generate(var, LABELS[:1], top_k=top_k, stop=1, decode=False)
    assert len(captures) - before <= graphs.CAPTURES * (graphs.KEPT + 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nat all"), RuntimeError("it waits")])
def test_a_capture_that_fails(
    captures: list[Tape], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Calls of this kind run without a graph, new ones and continued ones; others do not. The reason is logged once."""
    var, tried = tiny_var(), []
    capture = graphs.capture

    def fail(run: Callable[[], Any], *arguments: Any) -> Any:
        tried.append(1)
        try:
            run()
            raise error
        finally:
            if isinstance(error, RuntimeError) and "waits" in str(error):
                raise RuntimeError("the capture cannot end")

    generate(var, LABELS[:1], graphs=True)
    monkeypatch.setattr(graphs, "capture", fail)
    for seed in range(4):
        try:
            raise KeyError("handled while it samples")
        except KeyError:
            same(generate(var, LABELS, seed=seed), without(var, LABELS, seed=seed))
    assert len(tried) == 1 and graphs.held()[id(var)].nbytes == 0
    (record,) = caplog.records
    assert f"{type(error).__name__}: {str(error).splitlines()[0]}" in record.getMessage()
    for seed in range(3):
        one, other = (make(var, LABELS, stop=1, decode=False, seed=seed).state for make in (generate, without))
        same(generate(var, state=one, seed=seed), without(var, state=other, seed=seed))
    assert len(tried) == 3
    with pytest.raises(type(error)):
        generate(var, LABELS, graphs=True)
    monkeypatch.setattr(graphs, "capture", capture)
    before = len(captures)
    generate(var, LABELS[:1])
    assert len(captures) == before + 1
    monkeypatch.setattr(
        graphs._Graph, "__call__", lambda self, given: fail(lambda: None)
    )  # no memory for what it ends with
    same(generate(var, LABELS[:1], seed=1), without(var, LABELS[:1], seed=1))
    assert not graphs._CAPTURED[var].by_key


def test_models_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures, replays and freeing of a device are made by one thread at a time."""
    inside, together = threading.Lock(), []

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if not inside.acquire(blocking=False):
                together.append(function)
                return function(*arguments)
            try:
                time.sleep(0.002)
                return function(*arguments)
            finally:
                inside.release()

        return wrapped

    monkeypatch.setattr(graphs, "needed", lambda *arguments: GROWN)
    monkeypatch.setattr(graphs, "total_memory", lambda device: 1.5 * GROWN / graphs.MEMORY)
    monkeypatch.setattr(graphs, "capture", alone(graphs.capture))
    monkeypatch.setattr(graphs._Graph, "__call__", alone(graphs._Graph.__call__))
    monkeypatch.setattr(graphs._Graphs, "forget", alone(graphs._Graphs.forget))
    models = [tiny_var(seed=seed) for seed in range(3)]
    expected = [[without(var, LABELS, seed=seed) for seed in range(6)] for var in models]

    def ask(index: int) -> list[Generation]:
        found = []
        for seed in range(6):
            found.append(generate(models[index], LABELS, seed=seed, graphs=True))
            if seed == 3:
                clear_graphs(models[index])
        return found

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(ask, range(3)))
    for one, other in zip(results, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    assert not together


def test_settings_of_attention() -> None:
    """Those of `torch.nn.attention.sdpa_kernel`: a graph has the kernels of its capture."""
    backends = torch.nn.attention.SDPBackend
    each = (backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH, backends.CUDNN_ATTENTION)
    found = {graphs.settings("cuda"), graphs.settings("cuda")}
    assert len(found) == 1
    for backend in each:
        with torch.nn.attention.sdpa_kernel(backend):
            found.add(graphs.settings("cuda"))
    assert len(found) == 5, found


def test_settings_of_precision() -> None:
    """In a process of its own: PyTorch's new settings make its older ones raise."""
    code = """
import torch
from fastvar.models.graphs import settings
found = {settings("cuda"), settings("cuda")}
assert len(found) == 1
torch.set_float32_matmul_precision("high")
found.add(settings("cuda"))
torch.backends.cudnn.allow_tf32 = False
found.add(settings("cuda"))
torch.backends.cuda.matmul.fp32_precision = "ieee"
found.add(settings("cuda"))
torch.backends.cudnn.conv.fp32_precision = "tf32"
found.add(settings("cuda"))
torch.backends.fp32_precision = "tf32"
found.add(settings("cuda"))
assert len(found) == 6, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peak_memory_counts_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the call replays, not what others hold."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    var, other = tiny_var(), tiny_var(seed=1)
    for each in (var, other):
        generate(each, LABELS, graphs=True)
    plain, graphed = (lambda: without(var, LABELS)), (lambda: generate(var, LABELS))
    assert peak_memory(plain, "cuda") == 2
    assert peak_memory(graphed, "cuda") == 2 + graphs.held()[id(var)].nbytes / 2**20 > 2


def test_benchmark_says_whether_a_graph_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = {"grids": "1,2", "depth": 1, "width": 64, "batch": 2, "dtype": "float32"}
    problem = suite.build(setting, torch.device("cpu"))
    call = problem.contenders["fastvar"]
    assert callable(call)
    backends = []
    for _ in range(3):
        call(**problem.inputs)
        backends.append(problem.backend)
    monkeypatch.setattr(graphs, "room", lambda device: 0)
    problem = suite.build(setting, torch.device("cpu"))
    call = problem.contenders["fastvar"]
    for _ in range(3):
        call(**problem.inputs)
    assert backends == ["no graphs", "graphs", "graphs"] and problem.backend == "no graphs"


def test_a_state_is_consumed() -> None:
    var = tiny_var()
    state = generate(var, LABELS, stop=1, decode=False).state
    generate(var, state=state, graphs=True)
    with pytest.raises(ValueError, match="it was continued before"):
        generate(var, state=state, graphs=True)


def test_adapters(captures: list[Tape]) -> None:
    """Switching them off is noticed, and so is another scale."""
    pytest.importorskip("peft")
    var = tiny_var()
    add_adapters(var, 2)
    with torch.no_grad():
        for name, parameter in var.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    same(generate(var, LABELS, graphs=True), without(var, LABELS))
    with without_adapters(var):
        same(generate(var, LABELS, graphs=True), without(var, LABELS))
    same(generate(var, LABELS, graphs=True), without(var, LABELS))
    assert len(captures) == 2
    for module in var.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    same(generate(var, LABELS, graphs=True), without(var, LABELS))
    assert len(captures) == 3


def test_autocast_and_inference_mode(captures: list[Tape]) -> None:
    var = tiny_var()
    with torch.inference_mode():
        generate(var, LABELS, graphs=True)
    same(generate(var, LABELS, graphs=True, seed=1), without(var, LABELS, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        first = generate(var, LABELS, graphs=True)
        same(first, without(var, LABELS))
        with torch.no_grad():
            var.head.weight.mul_(-1)
    with torch.autocast("cpu", torch.bfloat16):
        same(generate(var, LABELS, graphs=True), without(var, LABELS))
    assert len(captures) == 2


def test_no_images() -> None:
    var = tiny_var()
    same(generate(var, LABELS[:0], graphs=True), without(var, LABELS[:0]))


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^generate: graphs: expected a model on a GPU, got one on cpu"):
        generate(tiny_var(), LABELS, graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS)
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, settings: str) -> None:
    monkeypatch.undo()
    var: VAR = tiny_var().cuda()
    for seed in range(3):
        arguments = {"seed": seed, "log_probs": True, **SETTINGS[settings]}
        same(generate(var, LABELS.cuda(), graphs=True, **arguments), without(var, LABELS.cuda(), **arguments))
