"""Finds calls that make the host wait for a GPU, on a machine without one: tensors on it are fakes, without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from tests.helpers.tiny import CHANNELS, CODES, SQUARES

GPU = torch.device("cuda", 0)
_READ = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")


class Waits(TorchDispatchMode):
    """Raises an AssertionError at an operator inside that waits for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        why = _waits(func.overloadpacket.__name__, args, kwargs)
        assert why is None, why
        return func(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not any(tensor.device.type == "cuda" for tensor in tensors) and kwargs.get("device") != GPU:
        return None
    if name in _READ:
        return name
    if name in ("index", "index_put", "index_put_"):
        rows = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in rows):
            return f"{name} by a mask"
        if any(index.device.type == "cpu" for index in rows):
            return f"{name} by indices on the host"
    if name == "repeat_interleave" and args[0].ndim == 1 and kwargs.get("output_size") is None and len(args) == 1:
        return "repeat_interleave by counts on the GPU"
    if name == "_to_copy" and not kwargs.get("non_blocking"):
        there = torch.device(kwargs.get("device") or tensors[0].device)
        if there.type != tensors[0].device.type:
            return f"copy from {tensors[0].device.type} to {there}"
    if name == "copy_" and args[0].device.type != args[1].device.type and not (kwargs.get("non_blocking") or args[2:3]):
        return f"copy from {args[1].device.type} into {args[0].device.type}"
    return None


def fake_var(**fields: Any) -> VAR:
    """A VAR and its tokenizer on `GPU`, in evaluation mode; made within a FakeTensorMode."""
    common: dict[str, Any] = {"grids": SQUARES, "vocab_size": CODES, "code_channels": CHANNELS}
    shape = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
    with GPU, patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):  # it reads numbers
        tokenizer = VQTokenizer(VQTokenizerConfig(**common, **shape)).eval().requires_grad_(False)
        small: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5, **fields}
        var = VAR(VARConfig(**common, **small)).eval()
        var._tokenizer = (tokenizer,)  # set as an attribute it would be moved, which parameters of fakes are not
    return var


def fake_infinity(grids: Any) -> Infinity:
    """As `fake_var`. What is kept for its schedule is a fake from then on, so no other test may have these grids."""
    shape = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
    with GPU, patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        tokenizer = BSQTokenizer(BSQTokenizerConfig(grids=grids, bits=8, **shape)).eval().requires_grad_(False)
        small: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "text_channels": 12, "text_length": 6}
        net = Infinity(InfinityConfig(grids=grids, bits=8, pool_heads=4, **small)).eval()
        net._tokenizer = (tokenizer,)
    return net


def run_without_waiting(call: Callable[[VAR], Any], **fields: Any) -> int:
    """A call with a `fake_var`; how many operators it took."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        var = fake_var(**fields)
        with Waits() as waits:
            call(var)
    return waits.calls
