"""Runs a benchmark: checks every contender, then times those that are right, and makes the row of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks import records
from benchmarks.cases import OURS, Problem, Setting, Suite, relative_error, setting_name, tensors
from benchmarks.machine import peaks, roofline
from benchmarks.measure import Stopwatch, graphed, interleave, nvtx_range, reason
from benchmarks.memory import peak_memory
from benchmarks.order import sources
from benchmarks.rivals import versions


class Wrong(RuntimeError):
    """Our own contender is wrong: there is nothing to time."""


class Measured(NamedTuple):
    """The row of a pass, ready for JSON, and the seconds of each contender in every round."""

    row: dict[str, Any]
    seconds: dict[str, list[float]]


class Checked(NamedTuple):
    """A problem, the contenders' errors, what they may be at most, and what those raised that did."""

    problem: Problem
    errors: dict[str, float]
    limit: float
    failed: dict[str, str]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        budget: seconds to spend on the timing of one pass of one setting.
        rounds: least and most.
    """

    device: torch.device
    budget: float = 3.0
    rounds: tuple[int, int] = (5, 50)


class Runner:
    """Measures passes of settings; keeps one problem, as those of one setting come one after the other."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._key: tuple[str, str] | None = None
        self._problem: Problem | None = None
        self._checked: dict[tuple[bool, tuple[str, ...]], Checked] = {}

    def problem(self, suite: Suite, setting: Setting) -> Problem:
        """The problem of a setting, built anew unless it was the last one."""
        key = (suite.name, str(setting))
        if self._key != key:
            self._key, self._problem, self._checked = None, None, {}
            torch.compiler.reset()  # dynamo compiles a function for few shapes only, then runs it as it is
            torch.manual_seed(0)
            problem = suite.build(setting, self.options.device)
            names = tuple(problem.contenders)
            if names != suite.contenders:
                raise ValueError(f"{suite.name}: build: expected contenders {suite.contenders}, got {names}")
            self._key, self._problem = key, problem
        assert self._problem is not None
        return self._problem

    def measure(self, suite: Suite, setting: Setting, pass_: str) -> Measured:
        """One pass of one setting.

        Raises:
            Wrong: our contender's error is above its limit.
        """
        options, label = self.options, f"{suite.name}/{setting_name(setting)}/{pass_}/"
        with nvtx_range(label + "check"):
            checked = self.check(suite, setting, pass_)
        problem, errors, limit, failed = checked.problem, checked.errors, checked.limit, checked.failed
        wrong = {name: error for name, error in errors.items() if not error <= limit}
        calls = {name: call_of(problem, name, pass_) for name in errors if name not in wrong}
        seconds, raised = interleave(calls, options.device, options.budget, label=label, rounds=options.rounds)
        failed = {**failed, **raised}
        if OURS in failed:
            raise Wrong(f"{label}{OURS}: {failed[OURS]}")
        graph_seconds = self._graphs(calls) if self._with_graphs(suite, pass_) else {}
        dtype = getattr(torch, setting["dtype"])
        floor = self._floor(problem, pass_, dtype)
        contenders: dict[str, dict[str, Any]] = {}
        for name, values in seconds.items():
            spread = records.spread(values)
            contenders[name] = {"seconds": spread._asdict(), "error": errors.get(name)}
            if name in graph_seconds:
                contenders[name]["graph_seconds"] = graph_seconds[name]
            with suppress(OSError):  # a system that does not tell
                contenders[name]["peak_mib"] = round(peak_memory(calls[name], options.device), 2)
            if floor:
                contenders[name]["roofline"] = floor / spread.median
        row = {
            "benchmark": "suite",
            "suite": suite.name,
            "setting": dict(setting),
            "pass": pass_,
            "backend": problem.backend,
            "contenders": contenders,
            "ratios": _ratios(seconds),
            "missing": {name: why for name, why in problem.contenders.items() if isinstance(why, str)} | failed,
            "wrong": wrong,
            "limit": limit,
            "rounds": len(seconds[OURS]),
            "versions": versions(),
            "peaks": peaks(options.device, dtype)._asdict() if floor else None,
            "sources": sources(),
            "tuned": _tuned(records.device_name(options.device)),
            **records.provenance(options.device),
        }
        return Measured(row, seconds)

    def warm(self, suite: Suite, setting: Setting, pass_: str) -> None:
        """Call every contender once, so that later processes find its kernels compiled. Whoever raises is left out: for
        want of memory, say, of which others have a share."""
        problem = self.problem(suite, setting)
        for function in problem.contenders.values():
            if not isinstance(function, str):
                with suppress(Exception):
                    _results(function, problem.inputs, problem.gradients, pass_ != "forward")

    def stopwatch(self, suite: Suite, setting: Setting, pass_: str) -> Stopwatch:
        """The stopwatch of our contender, which is checked first.

        Raises:
            Wrong: its error is above its limit.
        """
        return Stopwatch(
            call_of(self.check(suite, setting, pass_, only=(OURS,)).problem, OURS, pass_), self.options.device
        )

    def check(self, suite: Suite, setting: Setting, pass_: str, only: tuple[str, ...] = ()) -> Checked:
        """How right the contenders are, or those that are named.

        Raises:
            Wrong: our contender's error is above its limit, or it raised.
        """
        problem = self.problem(suite, setting)
        training = pass_ != "forward"
        if (training, only) not in self._checked:
            title = f"{suite.name}, {setting_name(setting)}"
            self._checked[training, only] = self._check(problem, training, only, title)
        return self._checked[training, only]

    def _check(self, problem: Problem, training: bool, only: tuple[str, ...], title: str) -> Checked:
        check = problem.check or relative_error
        floats = [t.dtype for t in tensors(problem.inputs) if t.is_floating_point()]
        # more exact than the inputs; on a GPU no more than it takes
        half = bool(floats) and all(dtype.itemsize == 2 for dtype in floats)
        wide = torch.float32 if self.options.device.type == "cuda" and half else torch.float64
        expected, own_error = None, 0.0
        if problem.reference is not None:
            expected = _results(problem.reference, _converted(problem.inputs, wide), problem.gradients, training)
            if problem.limit is None:
                own_error = check(_results(problem.reference, problem.inputs, problem.gradients, training), expected)
            if not math.isfinite(own_error):
                raise ValueError(f"{title}: the reference's own error: {own_error}")
        errors, failed = {}, {}
        for name, function in problem.contenders.items():
            if isinstance(function, str) or (only and name not in only):
                continue
            try:
                results = _results(function, problem.inputs, problem.gradients, training)
            except Exception as error:  # whatever a rival does: it is named in the row
                failed[name] = reason(error)
                continue
            errors[name] = check(results, expected)
        epsilon = max((torch.finfo(dtype).eps for dtype in floats), default=torch.finfo(torch.float32).eps)
        limit = problem.limit if problem.limit is not None else 4 * own_error + (16 if epsilon < 1e-4 else 4) * epsilon
        if not errors.get(OURS, float("inf")) <= limit:
            why = failed.get(OURS) or f"error {errors[OURS]:.2g}, expected at most {limit:.2g}"
            raise Wrong(f"{title}, {'with gradients' if training else 'forward'}: {OURS}: {why}")
        return Checked(problem, errors, limit, failed)

    def _with_graphs(self, suite: Suite, pass_: str) -> bool:
        return suite.graphs and self.options.device.type == "cuda" and pass_ == "forward"

    def _graphs(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        replays = {}
        for name, call in calls.items():
            try:
                replays[name] = graphed(call)
            except Exception:  # the row then has no graph_seconds for it
                torch.cuda.synchronize()
        if not replays:
            return {}
        times, _ = interleave(replays, self.options.device, self.options.budget / 2, rounds=self.options.rounds)
        return {name: records.spread(values)._asdict() for name, values in times.items()}

    def _floor(self, problem: Problem, pass_: str, dtype: torch.dtype) -> float:
        """Seconds of the roofline."""
        flops, bytes_ = problem.flops, problem.bytes
        if pass_ == "training":
            flops, bytes_ = problem.training_flops, problem.training_bytes
        elif pass_ == "backward":
            if not problem.training_flops and not problem.training_bytes:
                return 0.0
            flops, bytes_ = problem.training_flops - flops, problem.training_bytes - bytes_
        return roofline(flops, bytes_, self.options.device, dtype)


def _tuned(device: str) -> str | None:
    """When the user's own tiles for a device were measured, if there are any."""
    from fastvar.kernels.common.tiling import own_tiles  # not there in older commits, which only `compare` runs

    return own_tiles(device).date or None


def call_of(problem: Problem, name: str, pass_: str) -> Callable[[], Any]:
    """What is timed."""
    function = problem.contenders[name]
    assert not isinstance(function, str)
    if pass_ == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(**problem.inputs)

        if hasattr(function, "setup"):
            forward.setup = function.setup
        return forward
    inputs, leaves = _with_leaves(problem.inputs, problem.gradients)
    if pass_ == "backward":
        return _Backward(function, inputs, leaves)
    return lambda: _gradients(function(**inputs), leaves)


class _Backward:
    """A backward pass; the forward pass before it is not timed."""

    def __init__(self, function: Callable[..., Any], inputs: dict[str, Any], leaves: list[torch.Tensor]) -> None:
        self._function, self._inputs, self._leaves = function, inputs, leaves
        self._result: Any = None

    def setup(self) -> None:
        self._result = self._function(**self._inputs)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        result, self._result = self._result, None
        return _gradients(result, self._leaves)


def _results(function: Callable[..., Any], inputs: dict[str, Any], gradients: tuple[str, ...], training: bool) -> Any:
    """What a contender returns and, of a training pass, the gradients it makes."""
    if not training:
        with torch.no_grad():
            return function(**inputs)
    inputs, leaves = _with_leaves(inputs, gradients)
    result = function(**inputs)
    return [t.detach() for t in tensors(result)], _gradients(result, leaves)


def _with_leaves(inputs: dict[str, Any], gradients: tuple[str, ...]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in gradients}
    return {**inputs, **leaves}, list(leaves.values())


def _gradients(result: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients of the sum of all results, weighted so that they do not cancel."""
    outputs = [t for t in tensors(result) if t.requires_grad]
    weights = [_weights(t) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


_WEIGHTS: dict[tuple[Any, ...], torch.Tensor] = {}


def _weights(like: torch.Tensor) -> torch.Tensor:
    """An incoming gradient, always the same for a shape; made before anything is timed and kept for the next call."""
    if like.ndim == 0:
        return torch.ones_like(like)  # a loss is where a backward pass begins
    key = (tuple(like.shape), like.dtype, like.device)
    if key not in _WEIGHTS:
        if len(_WEIGHTS) > 8:
            _WEIGHTS.clear()
        generator = torch.Generator(like.device).manual_seed(1)
        weights = torch.randn(like.shape, generator=generator, device=like.device)
        _WEIGHTS[key] = weights.bfloat16().to(like.dtype)  # the same numbers in every dtype
    return _WEIGHTS[key]


def _converted(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with all floating tensors in another dtype."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(convert, value))
        if isinstance(value, tuple | list):
            return type(value)(map(convert, value))
        return value

    return {name: convert(value) for name, value in inputs.items()}


def _ratios(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """For each rival how many times as long as ours it takes: the median and spread of the rounds' ratios."""
    ours = seconds[OURS]
    return {
        name: records.spread(theirs / own for theirs, own in zip(values, ours, strict=True))._asdict()
        for name, values in seconds.items()
        if name != OURS
    }
