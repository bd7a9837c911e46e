"""One declaration per operator: the record of its arguments, a fake and its implementations.

An `Operator` registers `fastvar::<name>` and, if it is differentiable, `fastvar::<name>_backward` with torch.library,
and wraps both in one autograd.Function. In eager mode, where nothing has to see the op, the implementation is called
directly: the way through torch.library costs more than a small kernel. An implementation is a function `forward(call)`
and, if it has one of its own, `backward(call, saved, grads, needs)`; without it the gradient is that of `forward`
recomputed under autograd. That is what references do: their gradient is right by construction.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import _C
from torch.autograd import profiler

from fastvar.kernels.common.recording import recording
from fastvar.ops._choices import CHOICES, Choice, Traits
from fastvar.ops._dispatch import PLAIN, REGISTRY, Chosen, Implementation, choose, resolve, saved_results
from fastvar.ops._record import Record
from fastvar.profiling import ENABLED, annotate

C = TypeVar("C")
Grads = Sequence[torch.Tensor | None]

_NOTHING = nullcontext()
NAMESPACE = "fastvar"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class Operator(Generic[C]):
    """An operator of the library `fastvar`.

    Args:
        name: the public name; the op is `torch.ops.fastvar.<name>`.
        call: the type of the record of a call's arguments, see `_record`. Its first value is the lead tensor. If it has
            a property `shared`, that says whether rows share a prefix and whether this has lengths of its own, as a
            choice may depend on both.
        results: how many tensors a call returns.
        fake: from a call to empty results of the right shape, dtype and contiguous layout.
        implementations: the preferred one first.
        choices: what "auto" takes on a GPU, in the order in which it is tried; see `_choices`.
        differentiable: False for operators whose results carry no gradient.
    """

    def __init__(
        self,
        name: str,
        call: type[C],
        results: int = 1,
        *,
        fake: Callable[[C], Any],
        implementations: Sequence[Implementation],
        choices: Sequence[Choice] = (),
        differentiable: bool = True,
    ) -> None:
        self.name = name
        self.record = Record(call)
        REGISTRY[name] = tuple(implementations)
        CHOICES[name] = tuple(choices)
        record = self.record
        self._needs: Any = namedtuple("needs", [record.names[i] for i in record.tensors])  # type: ignore[misc]
        self._has_shared = hasattr(call, "shared")
        returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"

        def fake_forward(*values: Any) -> Any:
            return fake(record.restore(values[:-1]))

        _LIBRARY.define(f"{name}({record.schema}, str backend) -> {returns}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake_forward, lib=_LIBRARY)
        operators = getattr(torch.ops, NAMESPACE)
        self.op = getattr(operators, name).default
        self._function: Any = None
        if differentiable:
            backward = f"{name}_backward"
            arguments = f"Tensor?[] grads, {record.schema}, Tensor[] saved, bool[] needs, str backend"
            _LIBRARY.define(f"{backward}({arguments}) -> Tensor[]")
            _LIBRARY.impl(backward, self._run_backward, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{backward}", self._fake_backward, lib=_LIBRARY)
            self.backward_op = getattr(operators, backward).default
            self._function = _autograd_function(self)

    def __call__(self, call: C, backend: str = "auto") -> Any:
        """The results, by the implementation that is chosen for the call."""
        return self.run(call, backend)[0]

    def run(self, call: C, backend: str) -> tuple[Any, Chosen | str]:
        """The results and the implementation that gave them, or its backend's name if it was called as an op."""
        values = self.record.values(call)
        tensors = self._tensors(values)
        tracked = False  # whether autograd would follow
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    tracked = True
        gradient = tracked and self._function is not None
        shared = call.shared if self._has_shared else (False, False)  # type: ignore[attr-defined]
        if not _runs_directly(tensors):
            name = resolve(self.name, backend, Traits(values[0], shared[0], shared[1], gradient)).backend
            return self._function.apply(*values, name, None) if gradient else self.op(*values, name), name
        chosen = choose(self.name, backend, values[0], shared, gradient)
        if gradient:
            return self._function.apply(*values, chosen, call), chosen
        return self._forward(call, chosen, tracked), chosen

    def gradients(
        self, values: Sequence[Any], saved: Sequence[torch.Tensor], grads: Grads, needs: Sequence[bool], chosen: Any
    ) -> list[torch.Tensor | None]:
        """The gradient of each tensor of a call, None where it is not needed; values: those of its record."""
        if not any(needs):
            return [None] * len(needs)
        if isinstance(chosen, Chosen) and _runs_directly((*self._tensors(values), *grads)):
            return self._backward(values, saved, grads, needs, chosen)
        backend = chosen if isinstance(chosen, str) else chosen.backend
        gradients = iter(self.backward_op(list(grads), *values, list(saved), list(needs), backend))
        return [next(gradients) if need else None for need in needs]

    def _tensors(self, values: Sequence[Any]) -> list[torch.Tensor | None]:
        return [values[i] for i in self.record.tensors]

    def _forward(self, call: C, chosen: Chosen, tracked: bool) -> Any:
        with surroundings(self.name, chosen.device, tracked):
            results = chosen.forward(call)
        if self.record.written:  # autograd has to see it, however it was done
            values = self.record.values(call)
            torch.autograd.graph.increment_version([values[i] for i in self.record.written])
        return results

    def _backward(
        self, values: Sequence[Any], saved: Sequence[torch.Tensor], grads: Grads, needs: Sequence[bool], chosen: Chosen
    ) -> list[torch.Tensor | None]:
        gradients: dict[str, torch.Tensor | None] = {}
        if any(grad is not None for grad in grads):
            with surroundings(f"{self.name} backward", chosen.device):
                if chosen.backward is None:
                    gradients = self._recomputed(values, grads, needs, chosen)
                else:
                    gradients = chosen.backward(self.record.restore(values), saved, grads, self._needs(*needs))
        results: list[torch.Tensor | None] = []
        for name, tensor, need in zip(self._needs._fields, self._tensors(values), needs, strict=True):
            gradient = gradients.get(name) if need else None
            if need and tensor is not None and gradient is None:
                gradient = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            results.append(gradient)
        return results

    def _recomputed(
        self, values: Sequence[Any], grads: Grads, needs: Sequence[bool], chosen: Chosen
    ) -> dict[str, torch.Tensor | None]:
        values = list(values)
        leaves: dict[str, torch.Tensor] = {}
        with recording():
            for i, need in zip(self.record.tensors, needs, strict=True):
                if values[i] is not None:
                    values[i] = values[i].detach().requires_grad_(need)
                if need:
                    leaves[self.record.names[i]] = values[i]
            results = chosen.forward(self.record.restore(values))
            results = (results,) if isinstance(results, torch.Tensor) else results
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
            if not pairs:
                return {}
            outputs, weights = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        return {n: None if g is None else g.contiguous() for n, g in zip(leaves, gradients, strict=True)}

    def _run(self, *args: Any) -> Any:
        *values, backend = args
        call = self.record.restore(values)
        return self._forward(call, choose(self.name, backend, values[0], (False, False), False), True)

    def _run_backward(self, grads: Grads, *args: Any) -> list[torch.Tensor]:
        *values, saved, needs, backend = args
        chosen = choose(self.name, backend, values[0], (False, False), False)
        gradients = self._backward(values, saved, grads, needs, chosen)
        # Results of an op may be neither its arguments nor one tensor twice, which autograd itself does not mind.
        taken = {grad.data_ptr() for grad in grads if grad is not None}
        results = []
        for gradient in gradients:
            if gradient is not None:
                if gradient.data_ptr() in taken:
                    gradient = gradient.clone(memory_format=torch.contiguous_format)
                taken.add(gradient.data_ptr())
                results.append(gradient)
        return results

    def _fake_backward(self, grads: Grads, *args: Any) -> list[torch.Tensor]:
        *values, _, needs, _ = args
        wanted = [
            tensor for tensor, need in zip(self._tensors(values), needs, strict=True) if need and tensor is not None
        ]
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in wanted]


def _runs_directly(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether an implementation is called without torch.library: there is no compiler, exporter, mode, transform,
    profiler or tensor subclass that has to see the op."""
    if torch.compiler.is_compiling() or (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
        or profiler._is_profiler_enabled
    ):
        return False
    for tensor in tensors:  # noqa: SIM110  # a generator costs more
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta):
            return False
    return True


def surroundings(name: str, device: torch.device, tracked: bool = True) -> AbstractContextManager[Any]:
    """What an implementation runs in: a range in profiles; no autocast, as dtypes are the operator's own affair; no
    gradient, where one would be `tracked`; the tensors' GPU. Only what changes something: entering all of them costs
    more than a small call."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind)
    tracked = tracked and torch.is_grad_enabled()
    elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    if not (ENABLED or autocast or tracked or elsewhere):
        return _NOTHING
    stack = ExitStack()
    if ENABLED:
        stack.enter_context(annotate(name))
    if autocast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if tracked:
        stack.enter_context(torch.no_grad())
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))  # kernels are launched on the current one
    return stack


def _autograd_function(operator: Operator[Any]) -> Any:
    tensors_at = operator.record.tensors

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *values, chosen, call = args
            ctx.set_materialize_grads(False)
            results = operator.op(*values, chosen) if call is None else operator._forward(call, chosen, False)
            kept = (results,) if isinstance(results, torch.Tensor) else results
            ctx.save_for_backward(
                *[values[i] for i in tensors_at], *[kept[i] for i in saved_results(operator.name, chosen)]
            )
            ctx.chosen, ctx.rest = chosen, tuple(None if i in tensors_at else v for i, v in enumerate(values))
            if not isinstance(results, torch.Tensor):
                ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
            return results

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            values, saved = list(ctx.rest), ctx.saved_tensors
            for i, tensor in zip(tensors_at, saved, strict=False):
                values[i] = tensor
            needs = [ctx.needs_input_grad[i] for i in tensors_at]
            gradients = operator.gradients(values, saved[len(tensors_at) :], grads, needs, ctx.chosen)
            result: list[Any] = [None] * (len(values) + 2)
            for i, gradient in zip(tensors_at, gradients, strict=True):
                result[i] = gradient
            return tuple(result)

    Function.__name__ = Function.__qualname__ = operator.name
    return Function
