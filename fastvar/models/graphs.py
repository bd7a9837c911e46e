"""Sampling by CUDA graphs: all scales of a call are captured once and replayed for other labels, subjects and seeds.

A graph works on memory of its own: what a call starts from is copied there, what it ends with is copied out. Weights
are read where they are, so that training goes on between calls; a model whose weights moved is captured again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from copy import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from fastvar.models.sampling import SamplingOptions, SamplingState
    from fastvar.models.var import VAR

KEPT = 8  # graphs of a model
_CAPTURED: WeakKeyDictionary[Any, OrderedDict[Hashable, _Graph]] = WeakKeyDictionary()
Sample = Callable[["VAR", "SamplingState", torch.Tensor, "SamplingOptions"], None]


def clear_graphs(var: VAR) -> None:
    """Free the memory of all graphs that `generate(graphs=True)` captured for a model."""
    _CAPTURED.pop(var, None)


def replayed(
    var: VAR, state: SamplingState, seeds: torch.Tensor, options: SamplingOptions, sample: Sample
) -> SamplingState:
    """What `sample(var, state, seeds, options)` makes of a state, by a graph; the state itself stays as it is."""
    kept = _CAPTURED.setdefault(var, OrderedDict())
    given = [*_tensors(state), seeds]
    device = seeds.device.type
    key = (
        options,
        (state.scale, state.cached, var.training),
        tuple((t.shape, t.dtype, t.device) for t in given),
        tuple(p.data_ptr() for module in (var, var.tokenizer) for p in (*module.parameters(), *module.buffers())),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    if key in kept:
        kept.move_to_end(key)
    else:
        while len(kept) >= KEPT:
            kept.popitem(last=False)
        finished = options.stop == len(var.schedule)
        kept[key] = _Graph(state, seeds, lambda state, seeds: sample(var, state, seeds, options), finished)
    return kept[key](state, seeds)


class _Graph:
    """A captured `run(state, seeds)`, which carries the state on; of a finished one no keys and values are kept."""

    def __init__(
        self,
        state: SamplingState,
        seeds: torch.Tensor,
        run: Callable[[SamplingState, torch.Tensor], None],
        finished: bool,
    ) -> None:
        before, self.seeds = state.map(torch.clone), seeds.clone()
        self.given = [*_tensors(before), self.seeds]
        self.after = before

        def whole() -> None:
            self.after = copy(before)
            self.after.cache = copy(before.cache)
            run(self.after, self.seeds)

        self.replay = capture(whole, seeds.device)
        if finished:
            self.after.cache.length, self.after.cache.prefix, self.after.cache.trunk = 0, None, None

    def __call__(self, state: SamplingState, seeds: torch.Tensor) -> SamplingState:
        for own, given in zip(self.given, [*_tensors(state), seeds], strict=True):
            own.copy_(given)
        self.replay()
        return self.after.map(torch.clone)


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run once, so that kernels are compiled and handles made, then capture; the answer replays. `run` is not carried
    out by the capture itself."""
    autocast = torch.autocast(
        device.type,
        torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,  # a cast weight would be freed after this call, and stale after a step
    )
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with autocast, torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with autocast, torch.cuda.graph(graph):
        run()
    return graph.replay


def _tensors(state: SamplingState) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    state.map(keep)
    return found
