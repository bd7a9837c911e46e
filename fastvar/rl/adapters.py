"""Low-rank adapters (LoRA) on a policy: few trained weights, and the reference is the same model without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastvar.installation import install_command
from fastvar.random import derive

if TYPE_CHECKING:
    from fastvar.models import Model

Kind = TypeVar("Kind", bound="Model")
TARGETS = ("qkv", "proj", "mlp_in", "mlp_out", "query", "kv")  # the last two are of attention to texts


def add_adapters(
    model: Kind, rank: int, *, alpha: int | None = None, targets: Sequence[str] = TARGETS, seed: int = 0
) -> Kind:
    """Put low-rank adapters beside linear layers of a model, in place, and freeze all else.

    The adapters start as zero: the model answers as before. Save `merged(model)`, which has none.

    Args:
        model: without adapters.
        rank: of the adapters, at least 1.
        alpha: their outputs are scaled by alpha / rank; 2 rank by default.
        targets: names of linear layers; those that the model does not have are left out.
        seed: of the half of the adapters that does not start as zero.

    Raises:
        ImportError: peft is not installed.
        ValueError: a rank below 1, a model that has adapters already.

    Source: LoRA (arXiv 2106.09685), by way of peft.
    """
    if rank < 1:
        raise ValueError(f"add_adapters: rank: expected at least 1, got {rank}")
    if has_adapters(model):
        raise ValueError("add_adapters: model: expected a model without adapters")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{error}; adapters need {install_command('lora')}") from error
    model.requires_grad_(False)
    options = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=list(targets))
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "adapters"))
        inject_adapter_in_model(options, model)
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return bool(_adapted(model))


def as_reference(reference: nn.Module, policy: nn.Module) -> AbstractContextManager[None]:
    """Inside the `with` a reference answers as one: the policy, which stands for itself before its adapters, without
    them; any other model as it is."""
    return without_adapters(policy) if reference is policy else nullcontext()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters, inside the `with`. Afterwards adapters are on or off, and weights are
    trained or frozen, as before.

    Raises:
        ValueError: a model that has none.
    """
    layers = [(layer, not layer.disable_adapters) for _, layer in _adapted(model)]
    if not layers:
        raise ValueError("without_adapters: model: expected a model with adapters")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer, _ in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, enabled in layers:
            layer.enable_adapters(enabled)
        for parameter, needs_gradient in trained:  # peft trains all that it enables
            parameter.requires_grad_(needs_gradient)


def merged(model: Kind) -> Kind:
    """A copy whose linear layers contain what the adapters add: a plain model."""
    return _merge(model.clone())


def plain(model: Kind) -> Kind:
    """The model without adapters: itself where it has none, or else what `merged` gives, made on the CPU, as there may
    be no room for one more copy where the model is."""
    return _merge(model.clone("cpu")) if has_adapters(model) else model


def _merge(copy: Kind) -> Kind:
    for name, layer in _adapted(copy):
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(copy.get_submodule(parent), attribute, layer.get_base_layer())
    return copy


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "enable_adapters")]
