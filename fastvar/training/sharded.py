"""Weights that FSDP2 has sharded: gathered for more than a block's forward pass, copied, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

_Model = TypeVar("_Model", bound=nn.Module)


def gather_for_methods(model: nn.Module) -> None:
    """Let blocks that FSDP2 (`fully_shard`) has sharded gather their weights for the methods that a transformer calls
    on them besides forward. Other models are left alone."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for method in ("modulate", "read_text", "keys_and_values", "mix"):
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)


def name_blocks(model: Any, blocks: Iterable[nn.Module]) -> None:
    """Tell accelerate's FSDP2 plugin, under TRANSFORMER_BASED_WRAP, what to shard and gather as one: each block."""
    model._no_split_modules = sorted({type(block).__name__ for block in blocks})


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that a model is sharded over; None for a whole one."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(own: Tensor | None, value: Tensor) -> Tensor:
    """A whole tensor, sharded over the processes where the run's own is."""
    if isinstance(own, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model that is not trained, in place: a block at a time, then all else. Call it by `called`."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in (*getattr(model, "blocks", ()), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    gather_for_methods(model)
    model.called = partial(_called, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "called")


def called(model: nn.Module, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(model, *arguments, **options)`. Of a model that `shard` has sharded the weights outside of its blocks
    are gathered inside; all processes have to call it, and to pass as many times through the blocks."""
    run: Any = getattr(model, "called", partial(_called, model))
    return run(function, *arguments, **options)


def _called(model: nn.Module, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    answer = function(model, *arguments, **options)
    if mesh_of(model) is None:
        return answer
    return tree_map_only(nn.Parameter, torch.clone, answer)  # weights that were gathered are freed when this returns


class Blueprint(Generic[_Model]):
    """Copies of a model that FSDP2 shards later on, and cannot copy any more then.

    Args:
        model: whole yet, with a method `clone()`.
        sharded: whether it may be sharded later on; its method is then `clone(device)`.
    """

    def __init__(self, model: _Model, *, sharded: bool = False) -> None:
        self.model = model
        self._empty: Any = model.clone("meta") if sharded else None  # type: ignore[operator]

    def clone(self) -> _Model:
        """A copy of the model as it is now, with weights of its own. They are sharded if the model's are, and at no
        time whole on a process."""
        mesh = mesh_of(self.model)
        if mesh is None:
            return self.model.clone()  # type: ignore[operator]
        copy: _Model = self._empty.clone()
        shard(copy, mesh)
        copy.to_empty(device=next(self.model.parameters()).device)
        with torch.no_grad():
            for own, theirs in zip(_tensors(copy), _tensors(self.model), strict=True):
                local(own).copy_(local(theirs))
        return copy

    def whole(self, copy: _Model) -> _Model:
        """A copy that is sharded put together, on the CPU of the first process; the others, which have to call it too,
        and a copy that is whole get the copy itself."""
        if mesh_of(copy) is None:
            return copy
        first = dist.get_rank() == 0
        whole: Any = self._empty.clone() if first else None
        for name, tensor in chain(copy.named_parameters(), copy.named_buffers()):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if first:
                _put(whole, name, full.detach().cpu())
        if first and getattr(whole, "has_tokenizer", False):
            whole.tokenizer = whole.tokenizer.clone("cpu")
        return whole.requires_grad_(False).train(copy.training) if first else copy


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return chain(model.parameters(), model.buffers())


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or a buffer of a model on the device "meta"."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        value = nn.Parameter(value, module._parameters[own].requires_grad)  # type: ignore[union-attr]
    setattr(module, own, value)
