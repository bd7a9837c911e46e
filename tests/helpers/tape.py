"""A stand-in for CUDA graphs on a CPU: it notes every operation and the memory that it reads and writes, and replays
the same operations on the same memory. Whatever Python did beside them is lost, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvar.models import graphs

GROWN = 1000  # bytes that a capture takes
_T = TypeVar("_T")


class Tape(TorchDispatchMode):
    """The operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.given: set[int] = set()  # memory that was there before
        self.made: dict[int, torch.Tensor] = {}
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []  # of what was there before, and what stood there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.given |= {place for place, _ in _memory((args, kwargs)) if place not in self.made}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written += [(tensor, tensor.clone()) for place, tensor in _memory(value) if place in self.given]
        result = func(*args, **kwargs)
        self.made |= {place: tensor for place, tensor in _memory(result) if place not in self.given}
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False), torch.no_grad():  # what these did was recorded
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def forget(self) -> None:
        """Undo what was written, and fill all that was computed with NaN: on a GPU a capture computes nothing."""
        with torch.no_grad():
            for tensor, before in reversed(self.written):
                tensor.copy_(before)
            for tensor in self.made.values():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


def _memory(values: Any) -> list[tuple[int, torch.Tensor]]:
    return [(t.untyped_storage().data_ptr(), t) for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def recorded(run: Callable[[], _T]) -> tuple[_T, Tape]:
    """As `fastvar.models.graphs.capture`: run once, then recorded; what that answers, and the tape."""
    run()
    torch.clear_autocast_cache()
    random = torch.get_rng_state()
    with Tape() as tape:
        after = run()
    torch.clear_autocast_cache()
    torch.set_rng_state(random)
    tape.forget()
    return after, tape


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Makes graphs on a CPU; the tapes recorded so far."""
    found: list[Tape] = []

    def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any, Any, int]:
        after, tape = recorded(run)
        found.append(tape)
        return after, tape.replay, pool, GROWN

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "runs_on", lambda device: True)
    return found
