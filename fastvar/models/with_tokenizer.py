"""A transformer that knows the tokenizer whose tokens it predicts: attached, moved and saved with it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvar.models.pretrained import PretrainedModel, has_model, weights_on

TOKENIZER_FOLDER = "tokenizer"
Tokenizer = TypeVar("Tokenizer", bound=PretrainedModel)


class WithTokenizer(PretrainedModel, Generic[Tokenizer]):
    """A model with a `tokenizer`. It is not a submodule: it has no part in this module's parameters and state dict, but
    follows its device, and is saved and loaded with it.

    A subclass names the tokenizer's class in `tokenizer_class` and the fields in which both configs have to agree in
    `agreed`, calls `_attach` when it is built, and has its weights where its `head` is. It runs its `blocks` by `_run`
    in training, which computes them again in the backward pass if `gradient_checkpointing` is set.
    """

    tokenizer_class: ClassVar[type[PretrainedModel]]
    agreed: ClassVar[tuple[str, ...]]
    _tokenizer: tuple[Tokenizer, ...]  # in a tuple, so that it is no submodule
    blocks: Sequence[nn.Module]

    def _attach(self, tokenizer: Tokenizer | None) -> None:
        self.gradient_checkpointing = False
        self._tokenizer = ()
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose tokens this model predicts.

        Raises:
            RuntimeError: none was attached.
        """
        if not self._tokenizer:
            name = type(self).__name__
            raise RuntimeError(f"{name}: tokenizer: none attached; pass one to {name}(...) or set model.tokenizer")
        return self._tokenizer[0]

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        ours, theirs = self.config, tokenizer.config
        for name in self.agreed:
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"{type(self).__name__}: tokenizer: expected {name} {getattr(ours, name)}, "
                    f"got {getattr(theirs, name)}",
                )
        self._tokenizer = (tokenizer.to(self.device),)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a module as a submodule before a property's setter saw it
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is attached."""
        return bool(self._tokenizer)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device  # type: ignore[union-attr,return-value]  # every subclass has one

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._tokenizer:
            self._tokenizer[0].to(self.device)
        return self

    def clone(self, device: torch.device | str | None = None) -> Self:
        """A copy with weights of its own, adapters included, and this one's tokenizer; on a device, if one is given,
        with a tokenizer of its own there. On the device "meta" it has no weights, and this one's tokenizer."""
        taken: dict[int, Any] = {id(shared): shared for shared in self._shared()}
        if device is not None:
            taken |= weights_on(self, device)
            if torch.device(device).type != "meta":
                taken |= {id(tokenizer): tokenizer.clone(device) for tokenizer in self._tokenizer}
        return copy.deepcopy(self, taken)

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # the state of random numbers is not there to be read while a graph is captured
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self._draws())
        return block(*inputs)

    def _draws(self) -> bool:
        """Whether a block draws random numbers."""
        if not self.training:
            return False
        modules = (vars(module) for block in self.blocks for module in block.modules())
        return any(fields.get("drop_path") or fields.get("p") for fields in modules)

    def _shared(self) -> tuple[object, ...]:
        """What copies have in common."""
        return self._tokenizer

    def _share(self, other: Self) -> None:
        """Take over what copies have in common."""
        self._tokenizer = other._tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._tokenizer:
            self.tokenizer._save_pretrained(save_directory / TOKENIZER_FOLDER)
        else:
            shutil.rmtree(save_directory / TOKENIZER_FOLDER, ignore_errors=True)
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        model = super()._from_pretrained(model_id=model_id, **kwargs)
        if has_model(model_id, TOKENIZER_FOLDER, **kwargs):
            tokenizer: Any = cls.tokenizer_class._from_pretrained(
                model_id=model_id, subfolder=TOKENIZER_FOLDER, **kwargs
            )
            model.tokenizer = tokenizer
        return model
