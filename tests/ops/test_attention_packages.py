"""Block-causal attention by other packages. They need a GPU; here FlexAttention runs without being compiled, and the
other packages are stood in for by PyTorch's attention behind their function's name."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastvar.kernels.block_causal_attention import impl_sdpa
from fastvar.kernels.block_causal_attention.by_scale import Part
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvar import ScaleSchedule
from fastvar.ops import PrefixKV, _dispatch, _packages, block_causal_attention, block_causal_attention_with_lse, explain
from fastvar.ops._dispatch import REGISTRY, Implementation
from fastvar.ops._packages import Package, package_implementation
from fastvar.ops.block_causal_attention import _FLASH_ATTN_4, AttentionCall
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

FOLDER = "fastvar.kernels.block_causal_attention"
LONG = ScaleSchedule((1, 5, 9, (10, 15)))  # 257 tokens, three tiles of rows
PREFIXES: dict[str, tuple[int, list[int] | None] | None] = {
    "none": None,
    "within a tile": (1, None),
    "a tile": (128, None),
    "several": (300, None),
    "ragged": (140, [0, 133]),
}


_ATEN = torch.ops.aten
_CPU_FORWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n, H, D) and the log-sum-exp (B, H, n)."""
    out, lse = _CPU_FORWARD(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2), lse


def gradients(*tensors: torch.Tensor, lse: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """Of q, k and v from the result's gradient, q, k, v and the result, all (B, n, H, D)."""
    found = _CPU_BACKWARD(*(t.transpose(1, 2) for t in tensors), lse, 0.0, False, scale=scale)
    return [t.transpose(1, 2) for t in found]


def flash_attn_2() -> dict[str, ModuleType]:
    """Stands in for flash-attn, by the names and the order of arguments of its version 2.8."""

    def forward(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):  # type: ignore[no-untyped-def]
        assert (dropout_p, causal, left, right, softcap, alibi_slopes) == (0.0, False, -1, -1, 0.0, None)
        return *attend(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)

    def backward(  # type: ignore[no-untyped-def]
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale,
        causal, left, right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, left, right, softcap, alibi_slopes) == (0.0, False, -1, -1, 0.0, None)
        assert deterministic and softmax_lse.is_contiguous()
        for place, found in zip(
            (dq, dk, dv), gradients(dout, q, k, v, out, lse=softmax_lse, scale=softmax_scale), strict=True
        ):
            place.copy_(found)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def xformers() -> dict[str, ModuleType]:
    """Stands in for xFormers 0.0.35."""
    names = ("xformers", "xformers.ops", "xformers.ops.fmha")
    modules = {name: ModuleType(name) for name in names}

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(q, k, v, scale)
        return out, F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)

    def backward(grad, output, lse, query, key, value, *, scale):  # type: ignore[no-untyped-def]
        assert lse.shape[2] == query.shape[1]
        return tuple(gradients(grad, query, key, value, output, lse=lse, scale=scale))

    fmha = modules["xformers.ops.fmha"]
    fmha.memory_efficient_attention_forward_requires_grad = forward  # type: ignore[attr-defined]
    fmha.memory_efficient_attention_backward = backward  # type: ignore[attr-defined]
    return modules


def flash_attn_4() -> dict[str, ModuleType]:
    """Stands in for flash-attn-4 4.0.0b36: a dense mask from the lists of tiles and the mask function."""
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.utils", "cutlass", "cutlass.cute")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    interface, sparsity = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.block_sparsity")
    Tiles = NamedTuple(
        "Tiles",
        [(name, Any) for name in (
            "mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx",
            "block_size", "dq_write_order", "dq_write_order_full", "spt",
        )],
    )  # fmt: skip
    Tiles.__new__.__defaults__ = (None,) * 4

    def dense(tiles, mask_mod, bounds, length, by_column):  # type: ignore[no-untyped-def]
        """(L, L) bool"""
        rows, columns = tiles.block_size[:: -1 if by_column else 1]
        seen = torch.zeros(-(-length // rows) * rows, -(-length // columns) * columns, dtype=torch.bool)
        place = torch.arange(max(seen.shape))
        for count, index, whole in (
            (tiles.mask_block_cnt, tiles.mask_block_idx, False),
            (tiles.full_block_cnt, tiles.full_block_idx, True),
        ):
            assert count.dtype == index.dtype == torch.int32 and index.is_contiguous()
            assert count.shape == index.shape[:3] == (1, 1, len(seen) // rows)
            for row in range(count.shape[2]):
                listed = index[0, 0, row, : count[0, 0, row]].tolist()
                assert listed == sorted(listed)
                for column in listed:
                    tile = seen[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
                    assert not tile.any()
                    down = place[row * rows : (row + 1) * rows, None]
                    across = place[None, column * columns : (column + 1) * columns]
                    queries, keys = (across, down) if by_column else (down, across)
                    tile[:] = True if whole else mask_mod(0, 0, [queries], keys, None, bounds)
        return seen[:length, :length].mT if by_column else seen[:length, :length]

    def hidden(q, k, mask_mod, aux_tensors, block_sparse_tensors, seqused_k, by_column):  # type: ignore[no-untyped-def]
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32 and (seqused_k > 0).all() and (seqused_k <= k.shape[1]).all()
            seen = torch.arange(k.shape[1]) < seqused_k[:, None, None, None]
        elif mask_mod is not None:
            seen = dense(block_sparse_tensors, mask_mod, aux_tensors, q.shape[1], by_column)[None, None]
        else:
            return None
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        return bias.expand(len(q), q.shape[2], q.shape[1], k.shape[1])

    def forward(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        *,
        softmax_scale,
        return_lse,
        mask_mod=None,
        aux_tensors=None,
        block_sparse_tensors=None,
        seqused_k=None,
    ):
        assert return_lse
        if block_sparse_tensors is not None:  # for head dimensions up to 96
            rows = 192 if torch.cuda.get_device_capability(q.device)[0] == 9 else 256
            assert block_sparse_tensors.block_size == (rows, 128)
        bias = hidden(q, k, mask_mod, aux_tensors, block_sparse_tensors, seqused_k, False)
        out, lse = _CPU_FORWARD(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None, None

    def backward(  # type: ignore[no-untyped-def]
        q, k, v, out, dout, lse, *, softmax_scale, deterministic, mask_mod=None, aux_tensors=None,
        block_sparse_tensors=None, seqused_k=None, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        hopper = torch.cuda.get_device_capability(q.device)[0] == 9  # where lists of tiles are summed in any order
        assert deterministic != (hopper and block_sparse_tensors is not None)
        if block_sparse_tensors is not None:
            assert block_sparse_tensors.dq_write_order.shape == block_sparse_tensors.mask_block_idx.shape
            assert block_sparse_tensors.spt is False
        bias = hidden(q, k, mask_mod, aux_tensors, block_sparse_tensors, seqused_k, True)
        tensors = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        found = _CPU_BACKWARD(*tensors, lse, 0.0, False, attn_mask=bias, scale=softmax_scale)
        # where no place is given it is fresh memory; nothing past a length is written
        places = [
            torch.full_like(t, torch.nan) if place is None else place
            for t, place in zip((q, k, v), (dq, dk, dv), strict=True)
        ]
        written = torch.ones(k.shape[:2], dtype=torch.bool)
        if seqused_k is not None:
            assert len(seqused_k) <= 256, "it wants to know of queries' lengths too"
            written = torch.arange(k.shape[1]) < seqused_k[:, None]
        for place, gradient, rows in zip(places, found, (slice(None), written, written), strict=True):
            place[rows] = gradient.transpose(1, 2)[rows]
        return tuple(places)

    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = Tiles  # type: ignore[attr-defined]
    sparsity.compute_dq_write_order = lambda *lists: (lists[5], lists[7])  # type: ignore[attr-defined]
    modules["cutlass"].Int32 = torch.int32
    modules["cutlass"].cute = modules["cutlass.cute"]
    modules["cutlass.cute"].jit = lambda function: function
    modules["flash_attn.cute.utils"].scalar_to_ssa = lambda value, dtype: value
    modules["flash_attn.cute"].utils = modules["flash_attn.cute.utils"]
    return modules | {interface.__name__: interface, sparsity.__name__: sparsity}


STAND_INS = {
    "flash_attn 2": flash_attn_2,
    "flash_attn 4, Hopper": flash_attn_4,
    "flash_attn 4, Blackwell": flash_attn_4,
    "xformers": xformers,
}


@pytest.fixture(params=["sdpa", "flex", *STAND_INS])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The implementation, behind the backend's name."""
    backend = request.param.split()[0]
    name = f"{FOLDER}.impl_{backend}"
    module: Any = None
    if request.param in STAND_INS:
        for package, stand_in in STAND_INS[request.param]().items():
            monkeypatch.setitem(sys.modules, package, stand_in)
        for own in (name, f"{FOLDER}.flash_attn_2", f"{FOLDER}.flash_attn_4"):
            monkeypatch.setitem(sys.modules, own, ModuleType(own))  # no other test will find the stand-in
            del sys.modules[own]
        module = import_module(name)
        if backend == "flash_attn":
            there = "flash-attn-4" if "4" in request.param else "flash-attn"
            monkeypatch.setattr(module, "_installed", lambda package: package == there)
            capability = (10, 0) if "Blackwell" in request.param else (9, 0)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    else:
        module = import_module(name)
        if backend == "flex":
            monkeypatch.setattr(module, "_attend", module.flex_attention)
    # behind the operator, on whatever device
    rows = REGISTRY["block_causal_attention"]
    here = (Implementation(each.backend, name, saves=each.saves) if each.backend == backend else each for each in rows)
    monkeypatch.setitem(REGISTRY, "block_causal_attention", tuple(here))
    return module


def backend(module: Any) -> str:
    return str(module.__name__.partition("impl_")[2])


@pytest.mark.parametrize(("block_diagonal", "layout"), [(False, "slices"), (True, "heads last")])
@pytest.mark.parametrize("name", PREFIXES)
def test_as_the_reference(
    module: Any, name: str, block_diagonal: bool, layout: str, request: pytest.FixtureRequest
) -> None:
    """Results and gradients, those of the log-sum-exp too."""
    size, lengths = PREFIXES[name] or (0, None)
    tensors = [*(noise(4, LONG.num_tokens, 3, 2, 16, seed=4) * 2).unbind(2), *noise(2, 2, size, 2, 16, seed=5)]
    if layout == "heads last":
        tensors = [t.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2) for t in tensors]
    valid = None if lengths is None else torch.tensor(lengths)

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        prefix = PrefixKV(leaves[3], leaves[4], valid) if size else None
        arguments: Any = {"prefix": prefix, "softmax_scale": 0.3, "block_diagonal": block_diagonal, "backend": name}
        if name == "flex":  # its backward pass needs a GPU
            with torch.no_grad():
                return [block_causal_attention(*leaves[:3], LONG, **arguments)]
        out, lse = block_causal_attention_with_lse(*leaves[:3], LONG, **arguments)
        weights = [noise(*t.shape, dtype=dtype, seed=6) for t in (out, lse)]
        assert out.is_contiguous()
        return [out, lse, *torch.autograd.grad((out, lse), leaves[: 5 if size else 3], weights)]

    if lengths is not None and any(package in request.node.name for package in ("flash_attn 2", "xformers")):
        with pytest.raises(ValueError, match=r"^block_causal_attention: prefix\.lengths: expected none for backend="):
            run(backend(module), torch.float32)
        return
    for got, expected in zip(run(backend(module), torch.float32), run("reference", torch.float64), strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "deterministic", "calls"),
    [
        ("flash_attn 4, Hopper", False, 1),
        ("flash_attn 4, Hopper", True, 4),
        ("flash_attn 4, Blackwell", True, 1),
    ],
    indirect=["module"],
)
def test_the_same_bits_are_asked_for(
    module: Any, deterministic: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper flash-attn-4 then goes a scale at a time."""
    adapter, seen = import_module(f"{FOLDER}.flash_attn_4"), []
    whole = adapter._flash_attn_bwd
    monkeypatch.setattr(adapter, "_flash_attn_bwd", lambda *args, **rest: seen.append(rest) or whole(*args, **rest))
    q = noise(1, LONG.num_tokens, 1, 16).requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        got, expected = (
            torch.autograd.grad(block_causal_attention(q, q, q, LONG, backend=name).sin().sum(), q)[0]
            for name in ("flash_attn", "reference")
        )
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == calls and all(rest["deterministic"] for rest in seen) == deterministic


@pytest.mark.parametrize("module", ["flash_attn 4, Hopper"], indirect=True)
def test_many_prefixes_of_several_lengths(module: Any) -> None:
    """More than the package's gradient takes at once."""
    q, k, v = noise(3, 257, 1, 1, 16, seed=1).requires_grad_()
    results = []
    for name in ("flash_attn", "reference"):
        prefix = PrefixKV(k, v, torch.arange(257) % 2)
        out = block_causal_attention(q, q, q, ScaleSchedule((1,)), prefix=prefix, backend=name)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefixed", [False, True])
def test_empty_batch(module: Any, prefixed: bool) -> None:
    q = torch.empty(0, 5, 2, 16, requires_grad=True)
    prefix = PrefixKV(*torch.empty(2, 0, 3, 2, 16)) if prefixed else None
    out = block_causal_attention(q, q, q, ScaleSchedule((1, 2)), prefix=prefix, backend=backend(module))
    assert out.shape == q.shape


class StandIns:
    """PyTorch's operators for GPUs by that for CPUs: same arguments, results as they lay them out."""

    def _scaled_dot_product_cudnn_attention(self, q, k, v, attn_bias, compute_log_sumexp, *, scale):  # type: ignore[no-untyped-def]
        assert attn_bias is None and compute_log_sumexp
        out, lse = _CPU_FORWARD(q, k, v, scale=scale)
        return out, lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-untyped-def]
        self, grad_out, q, k, v, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
        max_q, max_k, dropout_p, is_causal, *, scale,
    ):  # fmt: skip
        assert logsumexp.ndim == 4 and logsumexp.is_contiguous() and attn_bias is None and not is_causal
        assert (dropout_p, math.copysign(1, dropout_p)) == (0, -1)  # plans of our own, always for dense ones
        assert all(t.transpose(1, 2).is_contiguous() for t in (grad_out, out))
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return _CPU_BACKWARD(grad_out, q, k, v, out, logsumexp[..., 0], dropout_p, is_causal, scale=scale)

    def _scaled_dot_product_flash_attention(self, q, k, v, *, scale):  # type: ignore[no-untyped-def]
        return *_CPU_FORWARD(q, k, v, scale=scale), None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_flash_attention_backward(  # type: ignore[no-untyped-def]
        self, grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, *, scale,
    ):  # fmt: skip
        assert logsumexp.is_contiguous() and (max_q, max_k) == (q.shape[2], k.shape[2])
        return _CPU_BACKWARD(grad_out, q, k, v, out, logsumexp, dropout_p, is_causal, scale=scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, attn_bias, compute_log_sumexp, *, scale):  # type: ignore[no-untyped-def]
        out, lse = _CPU_FORWARD(q, k, v, attn_mask=attn_bias, scale=scale)
        return out, F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None

    def _scaled_dot_product_efficient_attention_backward(  # type: ignore[no-untyped-def]
        self, grad_out_, q, k, v, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,
        is_causal=False, *, scale,
    ):  # fmt: skip
        rows = q.shape[2]
        assert logsumexp.shape[2] % 32 == 0 and (logsumexp[:, :, rows:] == torch.inf).all()
        assert attn_bias is None or all(stride % 8 == 0 for stride in attn_bias.stride()[:3])
        lse = logsumexp[:, :, :rows].contiguous()
        found = _CPU_BACKWARD(grad_out_, q, k, v, out, lse, dropout_p, is_causal, attn_mask=attn_bias, scale=scale)
        return *found, None


@pytest.mark.parametrize("lengths", [None, [0, 133], [-3, 1000]])
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_kernels_for_gpus(kernel: str, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of PyTorch's kernels gets its arguments as it wants them. Lengths outside of the prefix are cut to it."""
    q, k, v = (noise(4, LONG.num_tokens, 3, 2, 16, seed=4) * 2).unbind(2)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *noise(2, 2, 140, 2, 16, seed=5))]
    results = {}
    for backend in ("reference", "sdpa"):
        if backend == "sdpa":
            monkeypatch.setattr(impl_sdpa, "_ATEN", StandIns())
            monkeypatch.setattr(impl_sdpa, "_kernel", lambda *args: "efficient" if args[3] is not None else kernel)
            monkeypatch.setattr(impl_sdpa, "_cudnn_lse_rank", lambda device: 4)
        valid = None if lengths is None else torch.tensor(lengths)
        prefix = PrefixKV(leaves[3], leaves[4], valid)
        out, lse = block_causal_attention_with_lse(*leaves[:3], LONG, prefix=prefix, backend=backend)
        results[backend] = [out, lse, *torch.autograd.grad((out.sin().sum(), lse.sin().sum()), leaves)]
    for got, expected in zip(results["sdpa"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_kernels_for_gpus_exist(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes the arguments, and its results have the shapes that are expected, on tensors without values."""
    monkeypatch.setattr(impl_sdpa, "_kernel", lambda *args: kernel)
    q, k, v = torch.empty(3, 2, 40, 3, 64, dtype=torch.bfloat16, device="meta").transpose(-1, -2).mT
    package = impl_sdpa._ScaledDotProducts()
    out, lse = package.attend(Part(q, k, v, 0.1, None))
    assert out.shape == q.shape and lse.shape == (2, 3, 40) and lse.dtype == torch.float32
    found = package.gradients(Part(q, k, v, 0.1, None), out, out, lse)
    assert [g.shape for g in found] == [q.shape] * 3


def test_no_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 0)
    q = torch.empty(1, 3, 5, 24, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"^block_causal_attention: .*backend='sdpa', .* PyTorch chooses MATH"):
        impl_sdpa._kernel(q, q, q, None, 1.0)


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("name", PREFIXES)
def test_block_mask_is_exact(name: str, block_diagonal: bool) -> None:
    """Tiles said to be whole are seen whole, tiles left out are not seen at all, and none is masked without need."""
    module = import_module(f"{FOLDER}.impl_flex")
    size, lengths = PREFIXES[name] or (0, None)
    if lengths is None:
        mask = module.block_mask(LONG, size, block_diagonal, torch.device("cpu"))
    else:
        mask = module.ragged_block_mask(LONG, size, block_diagonal, torch.tensor(lengths))
    i, j = torch.arange(LONG.num_tokens)[:, None], torch.arange(size + LONG.num_tokens)
    tiles = {kind: torch.zeros(3, -(-len(j) // 128), dtype=torch.bool) for kind in ("masked", "whole")}
    for kind, count, indices in (
        ("masked", mask.kv_num_blocks, mask.kv_indices),
        ("whole", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(3):
            tiles[kind][row, indices[0, 0, row, : count[0, 0, row]].long()] = True
    for b in range(2):
        seen = mask.mask_mod(torch.tensor(b), 0, i, j)
        for row in range(3):
            for column in range(tiles["whole"].shape[1]):
                part = seen[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
                assert part.all() or not tiles["whole"][row, column]
                assert not part.any() or tiles["whole"][row, column] or tiles["masked"][row, column]
                if lengths is None:
                    assert not tiles["masked"][row, column] or (part.any() and not part.all())


def test_flex_compiles_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths are no other graph, and more shapes than PyTorch's limit of eight are no error."""
    module = import_module(f"{FOLDER}.impl_flex")
    torch._dynamo.reset()
    compiled = torch.compile(module.flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    q = noise(4, 5, 2, 16)
    counters, before = torch._dynamo.utils.counters["stats"], 0
    for size in range(1, 12):
        if size == 2:  # whatever a first call in this process makes besides
            before = counters["unique_graphs"]
        k, v = noise(2, 2, size, 2, 16)
        for lengths in ([0, size], [size, 1], [-1, size + 5]):  # the last ones are cut to the prefix
            call = AttentionCall(q, q, q, ScaleSchedule((1, 2)), PrefixKV(k, v, torch.tensor(lengths)), 0.3, False)
            expected = import_module(f"{FOLDER}.reference").forward(call)[0]
            with torch.no_grad():
                torch.testing.assert_close(module.forward(call)[0], expected, rtol=1e-5, atol=1e-5)
    assert counters["unique_graphs"] - before == 10


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.bfloat16, 64, None),
        (torch.float32, 128, None),
        (torch.float64, 64, "takes float32 or float16 or bfloat16, the tensor is float64"),
        (torch.float16, 20, "takes head dimensions that are multiples of 8 up to 256, the tensor's is 20"),
        (torch.float16, 264, "takes head dimensions that are multiples of 8 up to 256, the tensor's is 264"),
    ],
)
def test_what_sdpa_takes_on_a_gpu(dtype: torch.dtype, dim: int, reason: str | None) -> None:
    implementation = next(each for each in REGISTRY["block_causal_attention"] if each.backend == "sdpa")
    with FakeTensorMode():
        assert implementation.why_not(torch.empty(1, 5, 1, dim, dtype=dtype, device="cuda")) == reason


PACKAGES = (_FLASH_ATTN_4, Package("flash-attn", "flash_attn_2"))


@pytest.mark.parametrize(
    ("there", "family", "dim", "reason"),
    [
        ("flash-attn-4", "sm90", 256, None),
        ("flash-attn-4", "sm90", 104, "flash-attn-4 does not take head dimension 104 on such a GPU"),
        ("flash-attn-4", "sm100", 128, None),
        ("flash-attn-4", "sm100", 192, "flash-attn-4 does not take head dimension 192 on such a GPU"),
        ("flash-attn-4", "sm100", 256, None),
        ("flash-attn-4", "sm80", 64, r"flash-attn-4 is not for such a GPU \(pip install flash-attn\)"),
        ("flash-attn-4 flash-attn", "sm80", 192, None),
        ("flash-attn", "sm100", 192, None),
    ],
)
def test_which_package_takes_what(
    monkeypatch: pytest.MonkeyPatch, there: str, family: str, dim: int, reason: str | None
) -> None:
    monkeypatch.setattr(_packages, "installed", lambda package: package in there.split())
    monkeypatch.setattr(_packages, "generation", lambda device: family)
    implementation = package_implementation("flash_attn", PACKAGES, (torch.bfloat16,), op="block_causal_attention")
    with FakeTensorMode():
        told = implementation.why_not(torch.empty(1, 5, 1, dim, dtype=torch.bfloat16, device="cuda"))
    assert told is None if reason is None else re.match(reason, told or "")


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """That is a reason, found out once and only where it is asked for."""
    imported: list[str] = []
    _packages._failure.cache_clear()
    monkeypatch.setattr(_packages, "installed", lambda package: True)
    monkeypatch.setattr(_packages, "import_module", lambda name: imported.append(name) or import_module("is_not_there"))
    row = package_implementation(
        "flash_attn", PACKAGES[1:], (), op="block_causal_attention", devices=("cpu",), head_dims=None
    )
    others = [each for each in REGISTRY["block_causal_attention"] if each.backend != "flash_attn"]
    monkeypatch.setitem(REGISTRY, "block_causal_attention", (row, *others))
    q = noise(1, 5, 1, 16)
    assert explain("block_causal_attention", q).backend == "torch" and imported == []
    reason = "flash-attn does not import: ModuleNotFoundError: No module named 'is_not_there'"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^block_causal_attention: backend='flash_attn' cannot run: {reason}"):
            block_causal_attention(q, q, q, ScaleSchedule((1, 2)), backend="flash_attn")
    assert imported == ["fastvar.kernels.block_causal_attention.flash_attn_2"]
    monkeypatch.setattr(_dispatch, "PREFERENCE", {"": ("flash_attn",)})
    monkeypatch.setattr(_dispatch, "_warned", set())
    told = explain("block_causal_attention", q)
    assert told.backend == "torch" and told.reasons["flash_attn"].startswith(reason)
    with caplog.at_level(logging.WARNING, "fastvar"):
        _dispatch.forget_answers()
        block_causal_attention(q, q, q, ScaleSchedule((1, 2)))
    _dispatch.forget_answers()
    assert [text.partition(" (")[0] for text in caplog.messages] == [
        f"block_causal_attention: flash_attn is passed over: {reason}"
    ]
    _packages._failure.cache_clear()


def test_flash_attn_4_is_for_hopper_and_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"{FOLDER}.impl_flash_attn")
    monkeypatch.setattr(module, "_installed", lambda package: package == "flash-attn-4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        ValueError, match=r"^block_causal_attention: backend='flash_attn': expected the package flash-attn"
    ):
        module._implementation.__wrapped__(torch.device("cuda", 0))


@pytest.mark.cards
@pytest.mark.skipif(not _packages.installed("flash-attn-4"), reason="needs flash-attn-4")
@pytest.mark.parametrize(("major", "widths"), [(9, (64, 96, 128, 256)), (10, (64, 128, 256))])
def test_flash_attn_4_compiles(major: int, widths: tuple[int, ...]) -> None:
    """What is asked of it, forward and backward, on a machine without a GPU too."""
    command = [sys.executable, "-m", "tests.helpers.compile_flash_attn_4", *map(str, (major, *widths))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 5 * len(widths), done.stdout


@pytest.mark.parametrize("backend", ["flex", "flash_attn", "xformers"])
def test_says_why_it_cannot_run(backend: str) -> None:
    q = noise(1, 5, 1, 16)
    with pytest.raises(RuntimeError, match=f"^block_causal_attention: backend='{backend}' cannot run: runs on cuda"):
        block_causal_attention(q, q, q, ScaleSchedule((1, 2)), backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dim", "name", "deterministic"),
    [
        *product(["sdpa", "flex", "flash_attn", "xformers"], [64, 128], PREFIXES, [False]),
        *product(["flash_attn"], [64, 128], ["ragged"], [True]),
    ],
)
def test_on_a_gpu(backend: str, name: str, dim: int, deterministic: bool) -> None:
    """As the package computes it, with gradients, against the reference in float64. In a second call nothing waits for
    the device, and the bits are the same if that was asked for."""
    why_not = next(each for each in REGISTRY["block_causal_attention"] if each.backend == backend).missing()
    if why_not is not None:
        pytest.skip(why_not)
    size, lengths = PREFIXES[name] or (0, None)
    one_call = torch.cuda.get_device_capability()[0] in (9, 10)  # flash-attn-4, which takes them
    if lengths is not None and (backend == "xformers" or (backend == "flash_attn" and not one_call)):
        pytest.skip("takes no prefixes of several lengths")
    tensors = [*(noise(4, LONG.num_tokens, 3, 2, dim, seed=4) * 2).unbind(2), *noise(2, 2, size, 2, dim, seed=5)]
    valid = None if lengths is None else torch.tensor(lengths, device="cuda")

    def run(backend: str) -> list[torch.Tensor]:
        prefix = PrefixKV(leaves[3], leaves[4], valid) if size else None
        torch.use_deterministic_algorithms(deterministic and backend != "reference")
        try:
            out = block_causal_attention(*leaves[:3], LONG, prefix=prefix, backend=backend)
            return [out, *torch.autograd.grad(out, leaves[: 5 if size else 3], torch.ones_like(out))]
        finally:
            torch.use_deterministic_algorithms(False)

    results = {}
    for case, dtype in (("reference", torch.float64), ("plain", torch.bfloat16), (backend, torch.bfloat16)):
        leaves = [t.to("cuda", torch.bfloat16).to(dtype).requires_grad_() for t in tensors]
        results[case] = [t.detach().cpu() for t in run(backend if case == backend else "reference")]
    for got, plain, exact in zip(results[backend], results["plain"], results["reference"], strict=True):
        assert_as_accurate(got, plain, exact)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for got, first in zip(again, results[backend], strict=True):
        assert not deterministic or torch.equal(got.cpu(), first)
