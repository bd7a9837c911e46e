"""Block-causal attention by other packages. They need a GPU; here FlexAttention runs without being compiled, and the
other packages are stood in for by PyTorch's attention behind their function's name."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_as_accurate
from samples import noise

from fastvar import ScaleSchedule
from fastvar.ops import PrefixKV, block_causal_attention

FOLDER = "fastvar.kernels.block_causal_attention"
LONG = ScaleSchedule((1, 5, 9, (10, 15)))  # 257 tokens, three tiles of rows
PREFIXES: dict[str, tuple[int, list[int] | None] | None] = {
    "none": None,
    "within a tile": (1, None),
    "a tile": (128, None),
    "several": (300, None),
    "ragged": (140, [0, 133]),
}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


@pytest.fixture(params=["flex", "flash_attn", "xformers"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The implementation's function."""
    if request.param == "flex":
        module = import_module(f"{FOLDER}.impl_flex")
        monkeypatch.setattr(module, "_attend", lambda: module.flex_attention)
        return module.forward
    package = ModuleType(request.param)
    package.flash_attn_func = lambda q, k, v, *, softmax_scale, deterministic: attention(q, k, v, softmax_scale)  # type: ignore[attr-defined]
    package.ops = SimpleNamespace(memory_efficient_attention=attention)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, package)
    monkeypatch.setitem(sys.modules, f"{request.param}.ops", package.ops)
    name = f"{FOLDER}.impl_{request.param}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = import_module(name)
    monkeypatch.delitem(sys.modules, name)  # no other test may find the stand-in
    return module.forward


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("name", PREFIXES)
def test_as_the_reference(forward: Any, name: str, block_diagonal: bool) -> None:
    q, k, v = (noise(4, LONG.num_tokens, 3, 2, 16, seed=4) * 2).unbind(2)
    prefix, lengths = None, None
    if (given := PREFIXES[name]) is not None:
        prefix = noise(2, 2, given[0], 2, 16, seed=5)
        lengths = None if given[1] is None else torch.tensor(given[1])
    shared = (None, None) if prefix is None else tuple(prefix)
    arguments = (q, k, v, LONG, *shared, lengths, 0.3, block_diagonal, False)
    if lengths is not None and "flex" not in forward.__module__:
        with pytest.raises(ValueError, match=r"^block_causal_attention: prefix\.lengths: expected none for backend="):
            forward(*arguments)
        return
    out, _ = forward(*arguments)
    kv = None if prefix is None else PrefixKV(*prefix, lengths)
    expected = block_causal_attention(
        q, k, v, LONG, prefix=kv, softmax_scale=0.3, block_diagonal=block_diagonal, backend="reference"
    )
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


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


def test_log_sum_exp() -> None:
    """FlexAttention gives it; the others say that they do not."""
    module = import_module(f"{FOLDER}.copied_prefix")
    q = noise(1, 5, 1, 16)
    with pytest.raises(ValueError, match=r"^block_causal_attention: with_lse: expected none"):
        module.by_scale(attention, "xformers", q, q, q, ScaleSchedule((1, 2)), None, None, None, 1.0, False, True)


@pytest.mark.parametrize("backend", ["flex", "flash_attn", "xformers"])
def test_says_why_it_cannot_run(backend: str) -> None:
    q = noise(1, 5, 1, 16)
    with pytest.raises(RuntimeError, match=f"^block_causal_attention: backend='{backend}' cannot run: runs on cuda"):
        block_causal_attention(q, q, q, ScaleSchedule((1, 2)), backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("backend", ["flex", "flash_attn", "xformers"])
def test_on_a_gpu(backend: str, name: str) -> None:
    """As the package computes it, with gradients, against the reference in float64."""
    if backend != "flex":
        pytest.importorskip(backend)
    size, lengths = PREFIXES[name] or (0, None)
    if lengths is not None and backend != "flex":
        pytest.skip("takes no prefixes of several lengths")
    tensors = [*(noise(4, LONG.num_tokens, 3, 2, 64, seed=4) * 2).unbind(2), *noise(2, 2, size, 2, 64, seed=5)]
    results = {}
    for run, dtype in (("reference", torch.float64), ("plain", torch.bfloat16), (backend, torch.bfloat16)):
        leaves = [t.to("cuda", torch.bfloat16).to(dtype).requires_grad_() for t in tensors]
        valid = None if lengths is None else torch.tensor(lengths, device="cuda")
        prefix = PrefixKV(leaves[3], leaves[4], valid) if size else None
        chosen = backend if run == backend else "reference"
        out = block_causal_attention(*leaves[:3], LONG, prefix=prefix, backend=chosen)
        gradients = torch.autograd.grad(out.sum(), leaves[: 5 if size else 3])
        results[run] = [t.detach().cpu() for t in (out, *gradients)]
    for got, plain, exact in zip(results[backend], results["plain"], results["reference"], strict=True):
        assert_as_accurate(got, plain, exact)
