"""Sampling by CUDA graphs: a call is captured once and replayed for other prompts, subjects and seeds.

What is captured apart: shapes, dtypes, lengths of texts, the options of sampling (guidance, temperature, truncation,
where to stop, what to decode), the mode and adapters of each module, and PyTorch's settings of precision and attention.
A call of a kind that was not seen before runs without a graph; the second one is captured, so that what is called once
costs nothing more.

A graph works on memory of its own: what a call starts from is copied there, what it ends with is copied out. Weights
are read where they are, so that training goes on between calls; a model whose weights moved is captured again. Graphs
of a model share what they only need while they run, so a model's calls run one after the other, from whatever stream or
thread; and on one GPU a graph is replayed, captured or freed by one thread at a time.

The graphs of a model take little more memory than the largest of them, which is mostly its cache. A model keeps up to
KEPT graphs, the least recently used go first. Together the graphs of all models take up to MEMORY of a GPU, a share of
its memory: beyond that, those of the model that was used least recently are freed, and of one model alone all are; the
kind that was too much is not captured again, and any other kind CAPTURES times at most. A call that would take more is
not captured. Where a capture fails, for want of memory or as a module waits for the device, the model's graphs are
freed, a warning says why, and calls of that kind run without one. A warning also says, once for a model, what keeps
its calls from being captured.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastvar.models.next_scale import Model
from fastvar.ops import _checks

KEPT = 16
MEMORY = 0.15
SEEN = 256  # kinds of calls that are remembered, of a model
CAPTURES = 2  # of a kind of calls, unasked: those that drive out each other would be captured at every call
TOO_MUCH = (
    f"some calls run without CUDA graphs, which would take over {MEMORY:.0%} of the GPU's memory or more than is free"
)
Pool = Any  # what torch.cuda.graph_pool_handle answers
Start = Any  # a `Beginning` or a `SamplingState` of `fastvar.models.sampling`, which knows graphs, not they it
Options = Any  # its `ScaleOptions`
Draw = Callable[[Model, Start, torch.Tensor, Options], Any]  # its `draw`; what that answers has a `map` too
_T = TypeVar("_T")

logger = logging.getLogger("fastvar")


class _Graphs:
    """Those of a model, the one used last at the end; all are for weights in the same places."""

    def __init__(self, weights: tuple[int, ...], device: torch.device) -> None:
        self.weights, self.device = weights, device
        self.by_key: OrderedDict[Hashable, _Graph] = OrderedDict()
        self.captures: OrderedDict[Hashable, int] = OrderedDict()  # of each kind of calls; CAPTURES bar others
        self.pool: Pool = None
        self.pooled = 0  # bytes of the pool
        self.calls = 0  # that graphs have answered
        self.done: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return self.pooled + sum(graph.nbytes for graph in self.by_key.values())

    def note(self, key: Hashable, captures: int) -> None:
        self.captures.pop(key, None)
        self.captures[key] = captures
        while len(self.captures) > SEEN:
            self.captures.popitem(last=False)

    def forget(self, count: int | None = None) -> None:
        """Those that were used least recently, or all; the pool's memory goes with the last of them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # they may be running
        for _ in range(len(self.by_key) if count is None else count):
            self.by_key.popitem(last=False)
        if not self.by_key:
            self.pool, self.pooled = None, 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """After what other streams have asked of this model."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
        yield
        if self.device.type == "cuda":
            self.done = torch.cuda.current_stream(self.device).record_event()


_CAPTURED: WeakKeyDictionary[Any, _Graphs] = WeakKeyDictionary()  # the model used last at the end
_LOOK_UP = threading.Lock()  # of the dictionary
_ALONE: dict[torch.device, threading.RLock] = {}


def alone(device: torch.device) -> threading.RLock:
    """Held by the one thread that uses graphs on a device: captures share a stream, and a model's graphs may be freed
    for another's."""
    return _ALONE.setdefault(device, threading.RLock())


def clear_graphs(model: Model) -> None:
    """Free the memory of all graphs of a model. To be called after a change of the model other than of its weights, its
    mode and its adapters, which are noticed."""
    graphs = _CAPTURED.get(model)
    if graphs is None:
        return
    with alone(graphs.device):
        with _LOOK_UP:
            _CAPTURED.pop(model, None)
        graphs.forget()


class Held(NamedTuple):
    """What the graphs of a model hold.

    Attributes:
        nbytes: of memory on the device.
        calls: that they have answered so far.
    """

    nbytes: int
    calls: int


def held() -> dict[int, Held]:
    """What graphs hold, by the `id` of their model."""
    with _LOOK_UP:
        return {id(model): Held(graphs.nbytes, graphs.calls) for model, graphs in _CAPTURED.items()}


class Survey(NamedTuple):
    """What a graph depends on besides a call's own inputs and options.

    Attributes:
        weights: where they lie.
        modes: of each module what else decides what it computes: training, recomputation, an adapter's switches and
            scaling; of a training step also which weights are trained.
    """

    weights: tuple[int, ...]
    modes: tuple[Hashable, ...]


def survey(model: Model, *, must: bool = False) -> Survey | None:
    """A model as it is now, or None if its calls cannot be captured as they are made now.

    Raises:
        ValueError: says why not, if they must.
    """
    found = obstacle(model.device) or _of_sampling(model)
    if isinstance(found, Survey):
        return found
    if must:
        raise ValueError(f"generate: graphs: expected {found}")
    if runs_on(model.device) and not torch.compiler.is_compiling():
        _say(model, f"runs without CUDA graphs: expected {found}")
    return None


_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _say(model: Model, why: str) -> None:
    """Once for each model and reason."""
    said = _SAID.setdefault(model, set())
    if why not in said:
        said.add(why)
        logger.warning("generate: %s", why)


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be captured on a device now, whatever the model; None if it can."""
    if not runs_on(device):
        return f"a model on a GPU, got one on {device.type}"
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return "a plain call, got one under torch.compile or a dispatch mode"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a plain call, got one within the capture of another graph"
    if _checks.DEBUG:
        return "FASTVAR_DEBUG to be off, as its checks wait for the device"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "no forward hooks, got global ones"
    return None


def _of_sampling(model: Model) -> Survey | str:
    modules, weights = model.tokenizer.sampled_with()
    found = looked_at([model, *modules])
    if isinstance(found, str):
        return found
    return found._replace(weights=(*found.weights, *(weight.data_ptr() for weight in weights)))


def looked_at(roots: Sequence[nn.Module], *, training: bool = False) -> Survey | str:
    """The survey of modules and all within them, or what stands in the way. It is made for each call: no attribute is
    looked up but where it lies. A training step may have dropout, but not in what is recomputed, and no hooks on
    gradients; a model's tokenizer is then looked at too."""
    weights: list[int] = []
    modes: list[Hashable] = []
    modules, recomputed, drops = list(roots), False, ""
    if training and (_module._global_backward_hooks or _module._global_backward_pre_hooks):
        return "no backward hooks, got global ones"
    while modules:
        module = modules.pop()
        fields = module.__dict__
        mode, name = fields["training"], type(module).__name__
        if training and (fields["_backward_hooks"] or fields["_backward_pre_hooks"]):
            return f"no backward hooks, got some on a {name}"
        if name == "DistributedDataParallel":
            return "one process, got a model wrapped for several (DDP)"
        recomputed = recomputed or bool(fields.get("gradient_checkpointing"))
        if mode and (fields.get("p") or fields.get("drop_path")):
            drops = name
        if drops and (recomputed or not training):
            return f"no dropout, got some in a {drops}: put the model in evaluation mode"
        if fields["_forward_hooks"] or fields["_forward_pre_hooks"]:
            return f"no forward hooks, got some on a {name}"
        if fields.get("_compiled_call_impl") is not None or "_orig_mod" in fields["_modules"]:
            return f"a model that is not compiled, got a compiled {name}"
        for tensors in (fields["_parameters"], fields["_buffers"]):
            for tensor in tensors.values():
                if type(tensor).__name__ == "DTensor":
                    return "whole weights, got sharded ones (FSDP)"
                if tensor is None:
                    continue
                weights.append(tensor.data_ptr())
                if training:
                    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                        return f"no hooks on gradients, got some on a weight of a {name}"
                    modes.append(tensor.requires_grad)
        modes.append((mode, fields.get("gradient_checkpointing")))
        if hasattr(type(module), "active_adapters"):
            switches = ("disable_adapters", "merged", "active_adapters", "scaling")
            modes.append(tuple(str(getattr(module, switch, None)) for switch in switches))
        modules += [child for child in fields["_modules"].values() if child is not None]
        if training:
            modules += fields.get("_tokenizer", ())
    return Survey(tuple(weights), tuple(modes))


def runs_on(device: torch.device) -> bool:
    return device.type == "cuda"


def replay(
    model: Model,
    found: Survey,
    start: Start,
    seeds: torch.Tensor,
    options: Options,
    draw: Draw,
    *,
    at_first: bool = False,
) -> Any:
    """What `draw(model, start, seeds, options)` answers, by a graph; the start is left as it is. None if a call of this
    kind is not captured, or not yet: with `at_first` one is that was not seen before.

    Raises:
        Exception: whatever a capture raises, with `at_first`; without it, the call is to be made without a graph.
    """
    device, outer = seeds.device, sys.exception()
    shapes = tuple((t.shape, t.dtype) for t in [*_tensors(start), seeds])
    key = (options, start.kind, shapes, found.modes, settings(device.type))
    with alone(device):
        graphs, failed = _graphs_of(model, found.weights, device), ""
        try:
            # its memory is written to by later calls
            with graphs.in_turn(), torch.inference_mode(False), torch.no_grad():
                return _drawn(graphs, key, model, start, seeds, options, draw, at_first)
        except Exception as error:
            if at_first:
                graphs.forget()
                raise
            failed = reason(error, outer)
        # the exception, and what it holds of the device's memory, is gone
        graphs.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        graphs.note(key, CAPTURES)
        logger.warning("generate: calls of this kind run without a CUDA graph, which failed: %s", failed)
        return None


def reason(error: BaseException, outer: BaseException | None) -> str:
    """Of a capture that failed, in one line what came first, not that it could not end after that; `outer` was raised
    before the call."""
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _graphs_of(model: Model, weights: tuple[int, ...], device: torch.device) -> _Graphs:
    """Those of a model, which is now the one used last; none yet where its weights moved."""
    with _LOOK_UP:
        before = graphs = _CAPTURED.pop(model, None)
        if graphs is None or graphs.weights != weights:
            graphs = _Graphs(weights, device)
        _CAPTURED[model] = graphs
    if before is not None and before is not graphs:
        before.forget()
    return graphs


def _drawn(
    graphs: _Graphs,
    key: Hashable,
    model: Model,
    start: Start,
    seeds: torch.Tensor,
    options: Options,
    draw: Draw,
    at_first: bool,
) -> Any:
    """By a graph, which is captured if there is none and it is worth it."""
    given = [*_tensors(start), seeds]
    if key in graphs.by_key:
        graphs.by_key.move_to_end(key)
        drawn = graphs.by_key[key](given)
    else:
        nbytes = needed(model, start, options)
        if not at_first and not _worth_it(model, graphs, key, nbytes):
            return None
        graphs.forget(max(len(graphs.by_key) - KEPT + 1, 0))
        _free_others(graphs, max(graphs.nbytes, nbytes))  # the pool is there already
        graph = _Graph(model, start, seeds, options, draw, graphs.pool)
        graphs.by_key[key], graphs.pool = graph, graph.pool
        graphs.pooled += graph.grown
        graphs.note(key, graphs.captures.get(key, 0) + 1)
        drawn = graph(given)
        _free_some(model, graphs, key, at_first)
    graphs.calls += 1
    return drawn


def _worth_it(model: Model, graphs: _Graphs, key: Hashable, nbytes: int) -> bool:
    """Whether to capture a call now: the second of its kind, if there is room."""
    captures = graphs.captures.get(key)
    graphs.note(key, captures or 0)
    if captures is None or captures >= CAPTURES:
        return False
    if nbytes > room(graphs.device):
        _say(model, TOO_MUCH)
        return False
    return True


def _free_others(graphs: _Graphs, nbytes: int) -> None:
    """Free graphs of other models, those that were used least recently first, so that this one's may take `nbytes`."""
    with _LOOK_UP:
        others = [each for each in _CAPTURED.values() if each is not graphs and each.device == graphs.device]
    for each in others:
        if nbytes + sum(other.nbytes for other in others) <= MEMORY * total_memory(graphs.device):
            return
        each.forget()


def _free_some(model: Model, graphs: _Graphs, key: Hashable, keep: bool) -> None:
    """Free what is over the budget after a capture; the model whose graphs these are was used last."""
    _free_others(graphs, graphs.nbytes)
    if graphs.nbytes > MEMORY * total_memory(graphs.device):
        if not (len(graphs.by_key) == 1 and keep):
            graphs.forget()
            _say(model, TOO_MUCH)
        graphs.note(key, CAPTURES)


def needed(model: Model, start: Start, options: Options) -> int:
    """About how many bytes a call takes: keys and values, and the activations of its largest scale."""
    config, schedule, head = model.config, start.schedule, model.head.weight
    rows = start.batch * (2 if start.guided else 1)
    tokens = schedule.ends[options.stop - 1] - schedule.starts[start.scale]
    largest = max(schedule.lengths[start.scale : options.stop])
    width = round(config.embed_dim * (8 + 2 * config.mlp_ratio)) + 2 * len(head)
    elements = rows * (2 * config.depth * tokens * config.embed_dim + largest * width)
    return elements * head.element_size()


def total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def room(device: torch.device) -> int:
    """Bytes that a graph may take now."""
    free = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed before a capture
    return min(free + cached, round(MEMORY * total_memory(device)))


def settings(device: str) -> Hashable:
    """What PyTorch's settings are that decide which kernels are captured: of precision and attention."""
    backends: Any = torch.backends
    kernels = ("flash", "mem_efficient", "math", "cudnn")
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        tuple(_precision(module) for module in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn, backends)),
        torch.are_deterministic_algorithms_enabled(),
        tuple(getattr(backends.cuda, f"{name}_sdp_enabled")() for name in kernels),
    )


def _precision(backend: Any) -> Hashable:
    """How float32 is computed with. Once `fp32_precision` was set, the older settings raise where they are read."""
    try:
        return getattr(backend, "fp32_precision", None) or getattr(backend, "allow_tf32", None)
    except RuntimeError:
        return None


class _Graph:
    """A captured `draw` from a copy of what is given."""

    def __init__(
        self, model: Model, start: Start, seeds: torch.Tensor, options: Options, draw: Draw, pool: Pool
    ) -> None:
        before, own_seeds = start.map(torch.clone), seeds.clone()
        self.given = [*_tensors(before), own_seeds]

        def run() -> Any:
            return draw(model, before.map(lambda tensor: tensor), own_seeds, options)

        self.nbytes = sum(tensor.nbytes for tensor in self.given)  # besides the pool's
        self.after, self.replay, self.pool, self.grown = capture(run, seeds.device, pool)

    def __call__(self, given: list[torch.Tensor]) -> Any:
        for own, tensor in zip(self.given, given, strict=True):
            own.copy_(tensor, non_blocking=True)
        self.replay()
        return self.after.map(torch.clone)


def capture(run: Callable[[], _T], device: torch.device, pool: Pool) -> tuple[_T, Callable[[], None], Pool, int]:
    """Run once, so that kernels are compiled and handles made, then capture: what `run` answers, in the graph's memory,
    the function that replays it, the pool that the memory is from, and by how many bytes that has grown."""
    with torch.cuda.device(device):
        stream, current = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)
            # Weights that autocast casts are cast within the graph, once, and are not to outlive the capture.
            torch.clear_autocast_cache()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            pool = pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    after = run()
            except Exception:
                torch.cuda.set_stream(current)
                _abandon(graph, device, pool)
                raise
        finally:
            torch.clear_autocast_cache()
        return after, graph.replay, pool, torch.cuda.memory_reserved(device) - before


_ABANDONED: list[torch.cuda.CUDAGraph] = []


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Pool) -> None:
    """Put right what a capture leaves behind that was broken off, by a wait for the device: PyTorch ends it on the
    stream alone. One that ran out of memory has ended in order."""
    index = torch.cuda.current_device()
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
        graph.reset()
        _ABANDONED.append(graph)  # the allocator of pinned memory goes on asking it whether it captures
        _STREAMS.pop(device, None)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """That of all captures of a device: libraries keep a workspace for each stream that they have seen."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _tensors(start: Start) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    start.map(keep)
    return found
