"""One declaration per operator: schema, fake, autograd and the way to its implementations.

An `Operator` registers `fastvar::<name>` and, if it is differentiable, `fastvar::<name>_backward` with torch.library,
and wraps both in one autograd.Function. Where nobody wants to see the op, in eager mode, the implementation is called
directly: the way through torch.library costs more than a small kernel. Implementations are modules with a function
`forward` and, if they have one of their own, `backward`; without it the gradient is that of `forward` recomputed under
autograd. That is what references do: their gradient is right by construction.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from fastvar.ops._choices import Call
from fastvar.ops._dispatch import MODULES, PLAIN, REGISTRY, Implementation, resolve
from fastvar.profiling import ENABLED, annotate
from fastvar.schedule import ScaleSchedule

_NOTHING = nullcontext()
_LIBRARY = torch.library.Library("fastvar", "DEF")


class Operator:
    """An operator of the library `fastvar`.

    Args:
        name: the public name; the op is `torch.ops.fastvar.<name>`.
        arguments: the schema's arguments. An argument called `grids` (`int[]`, a flattened schedule) reaches the
            implementation as a `ScaleSchedule`.
        returns: the schema's results: "Tensor" or a tuple of them.
        fake: from the same arguments to empty results of the right shape, dtype and contiguous layout.
        implementations: the preferred one first.
        differentiable: False for operators whose results carry no gradient.
        function: the name of the implementations' forward function, where one module holds several operators.
        keeps_results: how many of the results, from the first one on, the backward functions of the implementations
            get too, as a list `results` before `needs`; None for all.
        passes: for an operator with one result, the number among the tensor arguments of one whose gradient is the
            incoming one: autograd hands it on, if contiguous without a copy, and no implementation is asked
            for it.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        returns: str,
        *,
        fake: Callable[..., Any],
        implementations: Sequence[Implementation],
        differentiable: bool = True,
        function: str = "forward",
        keeps_results: int | None = 0,
        passes: int | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self._keeps_results = keeps_results
        self._passes = passes
        REGISTRY[name] = tuple(implementations)
        fields = [field.split("=")[0].split() for field in _split_arguments(arguments)]
        self._schedule_at = next((i for i, field in enumerate(fields) if field[-1] == "grids"), None)
        self.tensors_at = tuple(i for i, field in enumerate(fields) if field[0] in ("Tensor", "Tensor?"))
        self._prefix_at = next((i for i, field in enumerate(fields) if field[-1] == "prefix_k"), None)
        self._ragged_at = next((i for i, field in enumerate(fields) if field[-1] == "prefix_lengths"), None)
        self._written_at = tuple(i for i, field in enumerate(fields) if "!" in field[0])

        _LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvar::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
        self.op = getattr(torch.ops.fastvar, name).default
        self._function: Any = None
        if differentiable:
            backward = f"{name}_backward"
            results = "" if keeps_results == 0 else "Tensor[] results, "
            _LIBRARY.define(f"{backward}(Tensor?[] grads, {arguments}, {results}bool[] needs, str backend) -> Tensor[]")
            _LIBRARY.impl(backward, self._run_backward, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastvar::{backward}", self._fake_backward, lib=_LIBRARY)
            self.backward_op = getattr(torch.ops.fastvar, backward).default
            self._function = _autograd_function(self, keeps_results, passes)

    def __call__(self, backend: str, *args: Any) -> Any:
        """Run the op: `args` are the schema's arguments, the first of them the lead tensor."""
        return self.run(self.resolve(backend, *args), *args)

    def run(self, chosen: str, *args: Any) -> Any:
        """Run it by the backend that `resolve` answered."""
        if self._wants_gradient(args):
            return self._function.apply(*args, chosen)
        return self.forward(*args, chosen)

    def forward(self, *args: Any) -> Any:
        """The op without its gradient: the schema's arguments and the backend."""
        return (self._run if self._unseen(args) else self.op)(*args)

    def backward(self, *args: Any) -> list[torch.Tensor]:
        """The backward op's arguments and results."""
        plain = all(grad is None or type(grad) in PLAIN for grad in args[0])
        return (self._run_backward if plain and self._unseen(args[1:]) else self.backward_op)(*args)

    def _unseen(self, args: Sequence[Any]) -> bool:
        """Whether nobody wants to see the op: no compiler, exporter, mode, transform, profiler or tensor subclass."""
        if torch.compiler.is_compiling() or not _nobody_looks():
            return False
        for i in self.tensors_at:
            tensor = args[i]
            if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta):
                return False
        return True

    def resolve(self, backend: str, *args: Any) -> str:
        """The backend that runs for a call."""
        prefix = self._prefix_at is not None and args[self._prefix_at] is not None
        ragged = self._ragged_at is not None and args[self._ragged_at] is not None
        return resolve(self.name, backend, Call(args[0], prefix, ragged, self._wants_gradient(args)))

    def _wants_gradient(self, args: Sequence[Any]) -> bool:
        if self._function is None or not torch.is_grad_enabled():
            return False
        return any(args[i] is not None and args[i].requires_grad for i in self.tensors_at)

    def _implementation(self, backend: str, tensor: torch.Tensor) -> Any:
        key = (self.name, backend)
        if key in MODULES:
            return MODULES[key]
        for implementation in REGISTRY[self.name]:
            if implementation.backend == backend:
                # An exported program, or a direct call of the op, has not been through `resolve`, which would have
                # loaded the extension and said what stands in the way.
                resolve(self.name, backend, Call(tensor))
                MODULES[key] = importlib.import_module(implementation.module)
                return MODULES[key]
        raise RuntimeError(f"{self.name}: backend={backend!r} does not exist for this operator")

    def _with_schedule(self, args: Sequence[Any]) -> list[Any]:
        args = list(args)
        if self._schedule_at is not None:
            args[self._schedule_at] = ScaleSchedule.from_flat(args[self._schedule_at])
        return args

    def _run(self, *args: Any) -> Any:
        forward = getattr(self._implementation(args[-1], args[0]), self.function)
        with surroundings(self.name, args[0].device):
            results = forward(*self._with_schedule(args[:-1]))
        if self._written_at:  # autograd has to see it, however it was done
            torch.autograd.graph.increment_version([args[i] for i in self._written_at])
        return results

    def _run_backward(self, grads: list[torch.Tensor | None], *rest: Any) -> list[torch.Tensor]:
        *args, needs, backend = rest
        if self._passes is not None and needs[self._passes]:  # a direct call, as autograd never asks
            asked = [need and i != self._passes for i, need in enumerate(needs)]
            found = self._run_backward(grads, *args, asked, backend)
            like = args[self.tensors_at[self._passes]]
            passed = torch.zeros_like(like) if grads[0] is None else grads[0]
            # a copy: results of an op may not be its arguments
            found.insert(sum(needs[: self._passes]), passed.clone(memory_format=torch.contiguous_format))
            return found
        module = self._implementation(backend, args[0])
        results = [] if self._keeps_results == 0 else [args.pop()]
        args = self._with_schedule(args)
        own = getattr(module, "backward" if self.function == "forward" else f"{self.function}_backward", None)
        with surroundings(f"{self.name} backward", args[0].device):
            if own is not None:
                return own(grads, *args, *results, needs)
            return _recomputed_gradients(getattr(module, self.function), grads, args, self.tensors_at, needs)

    def _fake_backward(self, grads: list[torch.Tensor | None], *rest: Any) -> list[torch.Tensor]:
        *args, needs, _ = rest
        wanted = [args[i] for i, need in zip(self.tensors_at, needs, strict=True) if need]
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in wanted]


def _split_arguments(arguments: str) -> list[str]:
    return [field.strip() for field in arguments.split(",")]


def surroundings(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """What an implementation runs in: a range in profiles; no autocast, as dtypes are the operator's own affair; no
    gradient; the tensors' GPU. Only what changes something: entering all of them costs more than a small call."""
    needed: list[AbstractContextManager[Any]] = []
    if ENABLED:
        needed.append(annotate(name))
    if torch.is_autocast_enabled(device.type):
        needed.append(torch.autocast(device.type, enabled=False))
    if torch.is_grad_enabled():
        needed.append(torch.no_grad())
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        needed.append(torch.cuda.device(device))  # kernels are launched on the current one
    if not needed:
        return _NOTHING
    stack = ExitStack()
    for context in needed:
        stack.enter_context(context)
    return stack


def _recomputed_gradients(
    forward: Callable[..., Any],
    grads: Sequence[torch.Tensor | None],
    args: list[Any],
    tensors_at: Sequence[int],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    leaves = []
    with torch.enable_grad():
        for i, need in zip(tensors_at, needs, strict=True):
            if args[i] is not None:
                args[i] = args[i].detach().requires_grad_(need)
            if need:
                leaves.append(args[i])
        results = forward(*args)
        results = (results,) if isinstance(results, torch.Tensor) else results
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]
        outputs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
    # clone: the gradients of a sum are one tensor, which may be the incoming one; results of an op may not alias
    seen = {grad.data_ptr() for grad in grads if grad is not None}
    gradients = []
    for gradient in found:
        gradient = gradient.contiguous()
        gradients.append(gradient.clone() if gradient.data_ptr() in seen else gradient)
        seen.add(gradient.data_ptr())
    return gradients


def _nobody_looks() -> bool:
    """Whether there is no mode, transform, trace or profiler that an op would be seen by."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _autograd_function(operator: Operator, keeps_results: int | None, passes: int | None) -> Any:
    tensors_at = operator.tensors_at

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.rest = tuple(None if i in tensors_at else arg for i, arg in enumerate(args))
            results = operator.forward(*args)
            kept = (results,) if isinstance(results, torch.Tensor) else results
            ctx.save_for_backward(*[args[i] for i in tensors_at], *kept[:keeps_results])
            if not isinstance(results, torch.Tensor):
                ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
            return results

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            args = list(ctx.rest)
            saved = ctx.saved_tensors
            for i, tensor in zip(tensors_at, saved, strict=False):
                args[i] = tensor
            results = [] if keeps_results == 0 else [list(saved[len(tensors_at) :])]
            needs = [ctx.needs_input_grad[i] for i in tensors_at]
            result: list[Any] = [None] * len(args)
            if passes is not None and needs[passes]:
                result[tensors_at[passes]] = None if grads[0] is None else grads[0].contiguous()
                needs[passes] = False
            found = iter(operator.backward(list(grads), *args[:-1], *results, needs, args[-1]) if any(needs) else ())
            for i, need in zip(tensors_at, needs, strict=True):
                if need:
                    result[i] = next(found)
            return tuple(result)

    Function.__name__ = Function.__qualname__ = operator.name
    return Function
