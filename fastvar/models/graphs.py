"""Sampling by CUDA graphs: all scales of a call are captured once and replayed for other labels, subjects and seeds.

A graph works on memory of its own: what a call starts from is copied there, what it ends with is copied out. Weights
are read where they are, so that training goes on between calls; a model whose weights moved is captured again. All
graphs of a model share memory: calls of one model are made one after the other, on one stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from copy import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

if TYPE_CHECKING:
    from fastvar.models.sampling import SamplingOptions, SamplingState
    from fastvar.models.var import VAR

KEPT = 8  # graphs of a model
Sample = Callable[["VAR", "SamplingState", torch.Tensor, "SamplingOptions"], None]
Run = Callable[["SamplingState", torch.Tensor], None]
Pool = Any  # what torch.cuda.CUDAGraph.pool answers


class _Graphs:
    """Those of a model, the one used last at the end; all are for weights in the same places."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights
        self.by_key: OrderedDict[Hashable, _Graph] = OrderedDict()
        self.pool: Pool = None


_CAPTURED: WeakKeyDictionary[Any, _Graphs] = WeakKeyDictionary()


def clear_graphs(var: VAR) -> None:
    """Free the memory of all graphs that `generate(graphs=True)` captured for a model. To be called after a change of
    the model other than of its weights, its mode and its adapters, which are noticed."""
    _CAPTURED.pop(var, None)


def replay_scales(
    var: VAR, state: SamplingState, seeds: torch.Tensor, options: SamplingOptions, sample: Sample
) -> None:
    """What `sample(var, state, seeds, options)` does to a state, by a graph.

    Raises:
        ValueError: a model whose weights are sharded: there is nowhere they stay.
    """
    modules = [module for part in (var, var.tokenizer) for module in part.modules()]
    weights = [t for module in modules for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    if any(hasattr(weight, "device_mesh") for weight in weights):
        raise ValueError("generate: graphs: expected whole weights, got sharded ones (FSDP)")
    places = tuple(weight.data_ptr() for weight in weights)
    graphs = _CAPTURED.get(var)
    if graphs is None or graphs.weights != places:
        graphs = _CAPTURED[var] = _Graphs(places)
    key = (
        options,
        (state.scale, state.cached),
        tuple((t.shape, t.dtype, t.device) for t in _tensors(state)),
        tuple(_mode(module) for module in modules),
        _settings(seeds.device.type),
    )
    with torch.inference_mode(False), torch.no_grad():  # a graph's memory is written to by later calls
        if key in graphs.by_key:
            graphs.by_key.move_to_end(key)
        else:
            while len(graphs.by_key) >= KEPT:
                graphs.by_key.popitem(last=False)
            finished = options.stop == len(var.schedule)
            run: Run = lambda state, seeds: sample(var, state, seeds, options)  # noqa: E731
            graph = _Graph(state, seeds, run, finished, graphs.pool)
            graphs.by_key[key], graphs.pool = graph, graph.pool
        graphs.by_key[key](state, seeds)


def _mode(module: nn.Module) -> Hashable:
    """What else of a module decides what it computes: training, and peft's switches of an adapter."""
    switches = ("disable_adapters", "merged", "active_adapters")
    return module.training, *(str(getattr(module, name, None)) for name in switches)


def _settings(device: str) -> Hashable:
    backends = torch.backends
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        torch.are_deterministic_algorithms_enabled(),
    )


class _Graph:
    """A captured `run(state, seeds)`, which carries the state on. Of a state that is finished by it no keys and values
    are handed back."""

    def __init__(self, state: SamplingState, seeds: torch.Tensor, run: Run, finished: bool, pool: Pool) -> None:
        before, self.seeds, self.finished = state.map(torch.clone), seeds.clone(), finished
        self.given = [*_tensors(before), self.seeds]

        def whole() -> SamplingState:
            after = copy(before)
            after.cache = copy(before.cache)
            run(after, self.seeds)
            return after

        self.after, self.replay, self.pool = capture(whole, seeds.device, pool)
        if finished:
            self.after.cache = before.cache

    def __call__(self, state: SamplingState, seeds: torch.Tensor) -> None:
        for own, given in zip(self.given, [*_tensors(state), seeds], strict=True):
            own.copy_(given)
        self.replay()
        after = self.after
        for name in ("tokens", "feature_map", "inputs", "log_probs", "sampled_log_probs"):
            value = getattr(after, name)
            setattr(state, name, None if value is None else value.clone())
        state.scale, state.cached = after.scale, after.cached
        if not self.finished:
            cache, length = copy(state.cache), after.cache.length
            cache.keys, cache.values = (t[:, :, :length].clone() for t in (after.cache.keys, after.cache.values))
            cache.length = length
            state.cache = cache


def capture(
    run: Callable[[], SamplingState], device: torch.device, pool: Pool
) -> tuple[SamplingState, Callable[[], None], Pool]:
    """Run once, so that kernels are compiled and handles made, then capture: what `run` answers, in the graph's memory,
    the function that replays it, and the pool that the memory is from."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        # Weights that autocast casts are cast within the graph, once, and are not to outlive the capture.
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            after = run()
        torch.clear_autocast_cache()
        return after, graph.replay, graph.pool()


def _tensors(state: SamplingState) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    state.map(keep)
    return found
