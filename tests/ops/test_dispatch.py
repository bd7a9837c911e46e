"""Which implementation runs: by name, by preference, by the table of GPUs; what an implementation may rely on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvar.ops import _dispatch, adaptive_layer_norm, explain, support
from fastvar.ops._choices import CHOICES, Choice
from fastvar.ops._dispatch import REGISTRY, Implementation, parse_preference
from fastvar.ops._operator import surroundings
from tests.helpers import toy_implementation as toy
from tests.helpers.samples import noise

NAME = "adaptive_layer_norm"
ROOT = Path(__file__).parents[2]
X, SCALE, SHIFT = noise(2, 3, 4), noise(2, 4, seed=1), noise(2, 4, seed=2)
TOY = X + SCALE[:, None]


def small(tensor: torch.Tensor) -> str | None:
    return "takes at most 2 samples; split the batch" if tensor.shape[0] > 2 else None


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the toy implementation, by default called "cpu", and after it the reference, which is always the last."""

    def install(backend: str = "cpu", *, prefer: str = "", **fields: Any) -> None:
        implementation = Implementation(backend, "tests.helpers.toy_implementation", **fields)
        monkeypatch.setitem(REGISTRY, NAME, (implementation, REGISTRY[NAME][-1]))
        monkeypatch.setattr(_dispatch, "_warned", set())
        monkeypatch.setattr(_dispatch, "PREFERENCE", parse_preference(prefer))
        _dispatch.forget_answers()
        toy.calls.clear()

    return install


def test_by_name(install: Callable[..., None]) -> None:
    install("triton")
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="triton"), TOY)
    assert toy.calls == ["forward"]
    reference = adaptive_layer_norm(X, SCALE, SHIFT, backend="reference")
    assert toy.calls == ["forward"] and not torch.equal(reference, TOY)


def test_auto_on_a_cpu(install: Callable[..., None]) -> None:
    """What is for GPUs is not taken there, even where it could run, as in Triton's interpreter."""
    reference = adaptive_layer_norm(X, SCALE, SHIFT, backend="reference")
    install("triton")
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
    install("cpu")
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), TOY)
    install("cpu", devices=("cuda",))
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)


def test_an_obstacle_is_logged_once(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(devices=("cpu",), obstacle=small)
    x, scale, shift = (torch.cat([t, t]) for t in (X, SCALE, SHIFT))
    expected = adaptive_layer_norm(x, scale, shift, backend="reference")
    with caplog.at_level(logging.WARNING, "fastvar"):
        for _ in range(3):
            assert torch.equal(adaptive_layer_norm(x, scale, shift), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "adaptive_layer_norm: cpu is passed over: takes at most 2 samples; split the batch"
    ]
    assert toy.calls == []
    adaptive_layer_norm(X, SCALE, SHIFT)
    assert toy.calls == ["forward"]


def test_another_device_is_no_downgrade(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(devices=("cuda",))
    with caplog.at_level(logging.WARNING, "fastvar"):
        adaptive_layer_norm(X, SCALE, SHIFT)
    assert caplog.records == []


def test_impossible_requests(install: Callable[..., None]) -> None:
    install(devices=("cpu",), obstacle=small)
    x, scale, shift = (torch.cat([t, t]) for t in (X, SCALE, SHIFT))
    with pytest.raises(
        RuntimeError, match="adaptive_layer_norm: backend='cpu' cannot run: takes at most 2 samples; split"
    ):
        adaptive_layer_norm(x, scale, shift, backend="cpu")
    install(devices=("cuda", "xpu"))
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: runs on cuda or xpu, the tensor is on cpu"):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="cpu")
    with pytest.raises(
        RuntimeError, match="backend='triton' does not exist for this operator; there is cpu, reference"
    ):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="triton")
    with pytest.raises(ValueError, match=r"adaptive_layer_norm: backend: expected one of .* got 'gpu'"):
        adaptive_layer_norm(X, SCALE, SHIFT, backend="gpu")


def gradients(backend: str) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (X, SCALE, SHIFT)]
    return list(torch.autograd.grad(adaptive_layer_norm(*leaves, backend=backend).sum(), leaves))


def test_own_backward(install: Callable[..., None]) -> None:
    install()
    assert [g.unique().tolist() for g in gradients("cpu")] == [[1.0], [2.0], [3.0]]
    assert toy.calls == ["forward", "backward"]


def test_without_a_backward_the_forward_is_differentiated(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.delattr(toy, "backward")
    assert [g.unique().tolist() for g in gradients("cpu")] == [[1.0], [3.0], [0.0]]
    assert toy.calls == ["forward", "forward"]


@pytest.mark.parametrize("own_backward", [True, False])
def test_autocast_stays_outside(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, own_backward: bool
) -> None:
    install()
    if not own_backward:
        monkeypatch.delattr(toy, "backward")
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ X.mT).dtype == torch.bfloat16
        assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="cpu"), TOY)
        gradients("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert toy.calls == ["forward", "forward", "backward" if own_backward else "forward"]


def test_explain(install: Callable[..., None]) -> None:
    install("triton")
    told = explain(NAME, X)
    assert repr(told) == str(told)
    assert told.backend == "reference"
    assert str(told).splitlines() == [
        "adaptive_layer_norm: reference",
        "  triton: only on explicit request: auto does not take it for such a call",
        "  reference: chosen",
    ]
    assert explain(NAME, X, "triton").reasons == {"triton": "chosen", "reference": "can run, another one comes first"}
    install(devices=("cpu",), obstacle=small)
    told = explain(NAME, torch.cat([X, X]))
    assert told.reasons == {"cpu": "takes at most 2 samples; split the batch", "reference": "chosen"}
    told = explain(NAME, torch.cat([X, X]), "cpu")
    assert (
        told.backend == "none: adaptive_layer_norm: backend='cpu' cannot run: takes at most 2 samples; split the batch"
    )
    with pytest.raises(ValueError, match=r"explain: op: expected one of .*'adaptive_layer_norm'.* got 'layer_norm'"):
        explain("layer_norm", X)
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain(NAME, X, "gpu")


def test_explaining_is_no_downgrade(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install(devices=("cpu",), obstacle=small)
    with caplog.at_level(logging.WARNING, "fastvar"):
        explain(NAME, torch.cat([X, X]))
    assert caplog.records == []


def test_support(install: Callable[..., None]) -> None:
    install(devices=("cpu", "cuda"), verified=("H200",))
    rows = [row for row in support().rows if row[0] == NAME]
    assert rows == [(NAME, "cpu", "cpu, cuda", "H200"), (NAME, "reference", "any", "CPU, H200")]
    assert {row[0] for row in support().rows} == set(REGISTRY)
    assert f"| {NAME} | cpu (H200)," in support().markdown()
    lines = str(support()).splitlines()
    assert len(lines) == len(support().rows) + 1 and lines[0].split() == [
        "operator",
        "backend",
        "devices",
        "tested",
        "on",
    ]
    assert repr(support()) == str(support()) and support()._repr_markdown_() == support().markdown()


def test_preference(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """What FASTVAR_BACKEND prefers is taken where it can run; an explicit backend is not touched by it."""
    reference = adaptive_layer_norm(X, SCALE, SHIFT, backend="reference")
    install("triton", prefer="cuda,triton")  # there is no cuda
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), TOY)
    assert explain(NAME, X).reasons["triton"] == "chosen: FASTVAR_BACKEND prefers it"
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT, backend="reference"), reference)
    install("cpu", prefer="cpu,adaptive_layer_norm=reference")  # an operator's own comes first
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
    install("triton", prefer="triton,adaptive_layer_norm=auto")  # all but this one
    assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
    with caplog.at_level(logging.WARNING, "fastvar"):
        install("triton", prefer="triton", devices=("cuda",))
        assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
        assert caplog.messages == []  # it is for other tensors
        install("triton", prefer="triton", missing=lambda: "triton is not installed")
        assert torch.equal(adaptive_layer_norm(X, SCALE, SHIFT), reference)
    assert caplog.messages == ["adaptive_layer_norm: triton is passed over: triton is not installed"]


def test_what_takes_no_lengths_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preference goes on where an explicit call gets its error."""
    q = torch.zeros(1, 5, 1, 8)
    here = tuple(
        replace(each, devices=(), missing=lambda: None) if each.backend == "xformers" else each
        for each in REGISTRY["block_causal_attention"]
    )
    monkeypatch.setitem(REGISTRY, "block_causal_attention", here)
    monkeypatch.setattr(_dispatch, "PREFERENCE", parse_preference("xformers"))
    told = [explain("block_causal_attention", q, prefix=True, ragged=ragged).backend for ragged in (False, True)]
    assert told == ["xformers", "torch"]


def test_parse_preference() -> None:
    assert parse_preference("") == parse_preference("auto") == {}
    assert parse_preference("triton,a=auto") == {"": ("triton",), "a": ("auto",)}
    assert parse_preference("triton, cuda,a=sdpa,a=triton,b=reference") == {
        "": ("triton", "cuda"),
        "a": ("sdpa", "triton"),
        "b": ("reference",),
    }


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ("reference", ""),
        ("triton", ""),  # for operators and tensors that have it
        ("cuda,adaptive_layer_norm=reference", ""),
        ("gpu", "FASTVAR_BACKEND: expected backends among"),
        ("=triton", "FASTVAR_BACKEND: expected backends among"),  # a name that the shell took for empty
        ("layer_norm=triton", "FASTVAR_BACKEND: expected operators among"),
        ("adaptive_layer_norm=cuda", "FASTVAR_BACKEND: adaptive_layer_norm: expected one of"),
    ],
)
def test_environment_variable(preference: str, expected: str) -> None:
    code = (
        "import torch; from fastvar.ops import adaptive_layer_norm, explain\n"
        "x = torch.zeros(1, 2, 3); print(explain('adaptive_layer_norm', x).backend)\n"
        "adaptive_layer_norm(x, x[:, 0], x[:, 0])"
    )
    environment = {**os.environ, "FASTVAR_BACKEND": preference}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode == 0) == (not expected) and expected in run.stderr, run.stderr
    if not expected:
        assert run.stdout.strip() == ("reference" if "reference" in preference else "torch")


HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "options", "expected"),
    [
        ("block_causal_attention", (8, 680, 16, 64), HALF, {}, "triton"),
        ("block_causal_attention", (8, 680, 16, 64), HALF, {"prefix": True, "gradient": True}, "triton"),
        ("block_causal_attention", (1, 2240, 30, 64), torch.float16, {"gradient": True}, "triton"),
        ("block_causal_attention", (1, 521, 16, 128), HALF, {"gradient": True}, "triton"),
        ("block_causal_attention", (1, 10521, 16, 128), HALF, {"gradient": True}, "sdpa"),
        ("block_causal_attention", (1, 10521, 16, 128), HALF, {"gradient": True, "prefix": True}, "sdpa"),
        (
            "block_causal_attention",
            (1, 10521, 16, 128),
            HALF,
            {"gradient": True, "prefix": True, "ragged": True},
            "triton",
        ),
        ("block_causal_attention", (1, 10521, 16, 128), HALF, {}, "triton"),
        ("block_causal_attention", (1, 680, 16, 64), FLOAT, {}, "triton"),
        ("cached_attention", (8, 256, 16, 64), HALF, {}, "triton"),
        ("qk_norm_rope", (8, 680, 16, 64), HALF, {"gradient": True}, "triton"),
        ("qk_norm_rope_into_cache", (8, 4, 16, 64), HALF, {}, "triton"),
        ("adaptive_layer_norm", (8, 680, 1024), FLOAT, {}, "triton"),
        ("adaptive_layer_norm", (8, 680, 1024), torch.float64, {}, "reference"),
        ("gated_residual", (8, 680, 1024), HALF, {"gradient": True}, "triton"),
        ("sample_tokens", (8, 256, 4096), FLOAT, {}, "triton"),
        ("sample_tokens", (8, 256, 2**17), FLOAT, {}, "reference"),
        ("sample_bits", (8, 256, 64), FLOAT, {}, "triton"),
        ("token_log_probs", (8, 680, 1024), HALF, {"gradient": True}, "triton"),
        ("policy_loss", (8, 680), FLOAT, {"gradient": True}, "triton"),
        ("propagate_mask", (8, 16, 16), torch.bool, {}, "triton"),
        ("gated_residual_norm", (8, 680, 1024), HALF, {"gradient": True}, "triton"),
        ("cross_entropy", (8, 680, 1024), HALF, {"gradient": True}, "triton"),
        ("group_norm_silu", (8, 160, 256, 256), HALF, {}, "triton"),
    ],
)
def test_what_a_gpu_gets(op: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict, expected: str) -> None:
    """The table, held with tensors of a GPU that need not be there."""
    pytest.importorskip("triton")
    with FakeTensorMode():
        told = explain(op, torch.empty(shape, dtype=dtype, device="cuda"), **options)
    assert told.backend == expected, told
    if expected != "reference":
        assert told.reasons[expected].startswith("chosen: ")


@pytest.mark.parametrize(
    ("op", "built", "not_built"),
    [
        ("residual_quantize", "cuda", "triton"),
        ("accumulate_scale", "cuda", "triton"),
        ("bitwise_residual_quantize", "cuda", "reference"),
        ("accumulate_bits", "cuda", "reference"),
    ],
)
def test_what_a_gpu_gets_of_the_extension(op: str, built: str, not_built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for missing, expected in ((None, built), ("not built", not_built)):
        rows = tuple(
            replace(row, missing=lambda missing=missing: missing, obstacle=lambda _: None)
            if row.backend == "cuda"
            else row
            for row in REGISTRY[op]
        )
        monkeypatch.setitem(REGISTRY, op, rows)
        with FakeTensorMode():
            assert explain(op, torch.empty(8, 32, 16, 16, device="cuda")).backend == expected


@pytest.mark.parametrize(
    ("family", "expected"), [("sm80", "triton"), ("sm89", "triton"), ("sm90", "sdpa"), ("sm100", "triton")]
)
def test_cudnn_is_for_hopper(family: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "generation", lambda device: family)
    with FakeTensorMode():
        q = torch.empty(1, 10521, 16, 128, dtype=HALF, device="cuda")
        assert explain("block_causal_attention", q, gradient=True).backend == expected


def test_what_is_called_measured_has_a_record() -> None:
    """Of the operator itself, at that commit, on a Hopper."""
    data = ROOT / "benchmarks" / "data"
    lines = [line for name in ("suites", "h200_kernels") for line in (data / f"{name}.jsonl").read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if "H200" in row["device"]]
    known = {(row["suite"], row["commit"][:7]) for row in rows}
    known.add(("residual_quantize", "b308ba9"))  # among the variants
    assert (
        "## Quantiser: one launch, ms, against the kernel of commit b11f690 (commit b308ba9"
        in (data / "h200_variants.txt").read_text()
    )
    claims = [(op, row) for op, choices in CHOICES.items() for row in choices if row.measured]
    assert len(claims) > 5
    for op, row in claims:
        (commit,) = row.measured.values()
        assert set(row.measured) == {"sm90"}
        assert (op, commit) in known, (op, commit)


def test_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row counts for the families that it names; where it was not measured, that is said."""
    rows = (Choice("triton", {"sm90": "1234567"}, ("sm90", "sm100"), gradient=True),)
    monkeypatch.setitem(CHOICES, NAME, rows)
    monkeypatch.setitem(
        REGISTRY, NAME, (Implementation("triton", "tests.helpers.toy_implementation"), REGISTRY[NAME][-1])
    )
    told = {}
    for family in ("sm90", "sm100", "sm80", ""):
        monkeypatch.setattr(_dispatch, "generation", lambda device, family=family: family)
        _dispatch.forget_answers()
        told[family] = explain(NAME, X, gradient=True)
    assert [each.backend for each in told.values()] == ["triton", "triton", "reference", "reference"]
    assert told["sm90"].reasons["triton"] == "chosen: recorded runs of commit 1234567 on sm90 show that it pays"
    assert told["sm100"].reasons["triton"] == "chosen: predicted to pay on sm100, not yet measured there"
    monkeypatch.setattr(_dispatch, "generation", lambda device: "sm90")
    _dispatch.forget_answers()
    toy.calls.clear()
    adaptive_layer_norm(X, SCALE, SHIFT)
    assert toy.calls == []
    adaptive_layer_norm(X.clone().requires_grad_(), SCALE, SHIFT)
    assert toy.calls == ["forward"]


def test_deterministic_algorithms() -> None:
    """Gradients whose bits change from run to run are for those who did not ask for others."""
    pytest.importorskip("triton")
    found = []
    with FakeTensorMode():
        q = torch.empty(1, 10521, 16, 128, dtype=HALF, device="cuda")
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                found.append([explain("block_causal_attention", q, gradient=g).backend for g in (False, True)])
            finally:
                torch.use_deterministic_algorithms(False)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # cuDNN is switched off
            found.append([explain("block_causal_attention", q, gradient=g).backend for g in (False, True)])
    assert found == [["triton", "sdpa"], ["triton", "triton"], ["triton", "triton"]]


def test_what_no_row_names_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where none of the table's implementations can run."""
    monkeypatch.setattr(_dispatch, "generation", lambda device: "sm90")
    _dispatch.forget_answers()
    text = str(explain("token_log_probs", torch.zeros(1, 2, 4)))
    assert "torch: chosen: what would come first cannot run" in text
    _dispatch.forget_answers()


def test_the_table_names_what_there_is() -> None:
    assert set(CHOICES) == set(REGISTRY)
    for op, choices in CHOICES.items():
        assert {choice.backend for choice in choices} <= {each.backend for each in REGISTRY[op]}, op


def test_kernels_are_launched_on_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for name in ("cuda:0", "cuda:1", "cpu"):
        with surroundings("", torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]
