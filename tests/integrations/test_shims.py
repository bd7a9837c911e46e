"""Stand-ins for attention packages: found only where none is, and they do what the packages do."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvar.cli import main
from fastvar.integrations import shims
from fastvar.integrations.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    fused_mlp_func,
    memory_efficient_attention,
    rms_norm,
    rms_norm_into,
)

HERE = [name for name in shims.PACKAGES if find_spec(name) is not None]
without = pytest.mark.skipif(bool(HERE), reason=f"{' and '.join(HERE)} installed, which no stand-in hides")


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    shims.uninstall()


@without
def test_imports_find_them_on_request_only() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")
    assert shims.install("flash_attn", "xformers") and shims.install("flash_attn")
    assert importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func is flash_attn_func
    for name, function in (
        ("flash_attn.ops.rms_norm", "rms_norm"),
        ("flash_attn.ops.fused_dense", "fused_mlp_func"),
        ("flash_attn.ops.layer_norm", "dropout_add_layer_norm"),
        ("xformers.ops", "memory_efficient_attention"),
    ):
        assert callable(getattr(importlib.import_module(name), function))
    # a checkout looks at these names to tell another flash-attn by them
    assert not any("Infinity" in name for name in flash_attn_func.__code__.co_varnames)
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.layers")
    with pytest.raises(ImportError):
        importlib.import_module("hart_backend")  # which was not asked for
    assert shims.install("hart_backend")
    assert importlib.import_module("hart_backend.fused_kernels").rms_norm is rms_norm_into
    shims.uninstall()
    assert "flash_attn" not in sys.modules and find_spec("flash_attn") is None


def test_a_real_package_is_never_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it get parts that it lacks."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert not shims.install("flash_attn")
    assert importlib.import_module("flash_attn").real
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.ops")
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_another_name() -> None:
    with pytest.raises(
        ValueError, match=r"shims.install: packages: expected some of flash_attn, xformers, hart_backend, got apex"
    ):
        shims.install("apex")


@without
def test_command(tmp_path: Path) -> None:
    """Processes below have them, without waiting for torch; the exit status is theirs."""
    code = "import sys; light = 'torch' not in sys.modules; import flash_attn; sys.exit(5 if light else 1)"
    script = tmp_path / "their_script.py"
    script.write_text(f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)")
    command = [sys.executable, "-m", "fastvar", "shim", "flash_attn", "--", sys.executable, str(script)]
    root = str(Path(shims.__file__).parents[2])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (5, "")


def test_command_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shim", "xformers"])
    assert "shim: command: expected one after --, got none" in capsys.readouterr().err


def test_they_attend() -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    wide = [t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *wide, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(flash_attn_func(q, k, v, softmax_scale=0.3), expected)
    assert flash_attn_func(q, k, v).view(2, 3, 32).shape == (2, 3, 32)  # as its callers do
    # the last query sees all
    causal = flash_attn_func(q, k, v, causal=True, softmax_scale=0.3)
    torch.testing.assert_close(causal[:, -1], expected[:, -1])
    torch.testing.assert_close(causal[:, :1], flash_attn_func(q[:, :1], k[:, :3], v[:, :3], softmax_scale=0.3))
    bias, wide = torch.randn(2, 4, 3, 5), [t.transpose(1, 2) for t in wide]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, *wide)), attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(memory_efficient_attention(q, *wide, attn_bias=bias), expected)
    with pytest.raises(NotImplementedError, match=r"flash_attn_func: softcap: expected 0.0 without flash-attn, got 3"):
        flash_attn_func(q, k, v, softcap=3)


@pytest.mark.parametrize("lengths", [(3, 1, 5), (4, 4)])
@pytest.mark.parametrize("queries", [(6, 6), (2, 7, 1)])
def test_they_attend_to_texts_of_several_lengths(lengths: tuple[int, ...], queries: tuple[int, ...]) -> None:
    queries = (*queries, 6)[: len(lengths)]
    q, kv = torch.randn(sum(queries), 2, 8), torch.randn(sum(lengths), 2, 2, 8)
    ends, starts = (torch.tensor([0, *each]).cumsum(0).int() for each in (lengths, queries))
    arguments = starts, ends, max(queries), max(lengths)
    found = flash_attn_varlen_kvpacked_func(q, kv, *arguments, softmax_scale=0.3)
    each = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (asked, *of_text.unbind(1))), scale=0.3)
        for asked, of_text in zip(q.split(queries), kv.split(lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(each, 1).transpose(0, 1))
    assert torch.equal(flash_attn_varlen_func(q, *kv.unbind(1), *arguments, softmax_scale=0.3), found)


def test_their_other_functions() -> None:
    x, first, second = torch.randn(2, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
    found = fused_mlp_func(x, first.weight, second.weight, first.bias, second.bias, save_pre_act=True, heuristic=0)
    torch.testing.assert_close(found, second(F.gelu(first(x), approximate="tanh")))
    weight = torch.randn(4)
    torch.testing.assert_close(rms_norm(x, weight, epsilon=1e-6), x * x.square().mean(-1, True).rsqrt() * weight)
    out = torch.empty_like(x)
    rms_norm_into(out, x, weight, 1e-6, False)
    assert torch.equal(out, rms_norm(x, weight, epsilon=1e-6))
    with pytest.raises(NotImplementedError, match="use_quant: expected False without HART's extension, got True"):
        rms_norm_into(out, x, weight, 1e-6, True)
