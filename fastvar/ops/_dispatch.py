"""Which implementation of an operator runs, why, and what else there is.

An explicit backend runs or raises. Without one, what the environment variable FASTVAR_BACKEND prefers comes first, as
far as it can run; then, on a GPU, what the table in `_choices` takes, and on a CPU what is in C++; then what PyTorch
does fast or in bounded memory; the reference is the last resort.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastvar.ops._choices import CHOICES, Traits, cudnn_attention, generation

logger = logging.getLogger("fastvar")

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda", "sdpa", "flex", "flash_attn", "xformers")
_EVERY = ""  # stands for all operators in a preference


def parse_preference(text: str) -> dict[str, tuple[str, ...]]:
    """What FASTVAR_BACKEND prefers, by operator: "triton,cuda" for all of them, in order, "policy_loss=reference" for
    one; both may be mixed, and an operator named several times has several, in order, or "auto" for none.

    Raises:
        ValueError: an unknown backend.
    """
    preferred: dict[str, tuple[str, ...]] = {}
    for word in text.split(","):
        op, equals, backend = (part.strip() for part in word.rpartition("="))
        if backend not in BACKENDS or (equals and not op):
            if not word.strip():
                continue
            raise ValueError(f"FASTVAR_BACKEND: expected backends among {BACKENDS}, or op=backend, got {word!r}")
        if backend != "auto" or equals:
            key = op if equals else _EVERY
            preferred[key] = (*preferred.get(key, ()), backend)
    return preferred


# Read once, when fastvar.ops is first imported, so that a call costs no look-up and stays traceable.
PREFERENCE = parse_preference(os.environ.get("FASTVAR_BACKEND", ""))


def check_preference() -> None:
    """Once all operators are there.

    Raises:
        ValueError: FASTVAR_BACKEND names an operator that does not exist, or a backend that an operator does not have.
    """
    for op, backends in PREFERENCE.items():
        if op == _EVERY:
            continue
        if op not in REGISTRY:
            raise ValueError(f"FASTVAR_BACKEND: expected operators among {tuple(REGISTRY)}, got {op!r}")
        for backend in backends:
            if backend != "auto" and _find(op, backend) is None:
                raise ValueError(f"FASTVAR_BACKEND: {op}: expected one of {_names(op)}, got {backend!r}")


def _no_obstacle(tensor: torch.Tensor) -> str | None:
    return None


def _nothing_missing() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        backend: its name among BACKENDS.
        module: the module that holds its functions `forward` and, unless the gradient is that of forward, `backward`;
            with "module:name" they are called `name` and `name_backward`. Imported on first use.
        devices: device types it runs on; empty means any.
        obstacle: called with the lead tensor, says why it cannot run (with the remedy), or None if it can.
        missing: says what of it is not installed (with the remedy), or None. Unlike an obstacle this is somebody's
            choice: "auto" passes over it and logs nothing.
        broken: called with the lead tensor, says why what is installed does not work, or None. As that may take an
            import, it is asked last, and only of what is about to be taken.
        ragged: whether it takes prefixes with lengths of their own; "auto" and preferences pass over it where there are
            such, an explicit call gets its error.
        verified: where it has been seen to run and agree with the reference, for the support matrix: "CPU", or a GPU's
            name.
        saves: places of the results that its backward pass gets, as `saved`.
    """

    backend: str
    module: str
    devices: tuple[str, ...] = ()
    obstacle: Callable[[torch.Tensor], str | None] = _no_obstacle
    missing: Callable[[], str | None] = _nothing_missing
    broken: Callable[[torch.Tensor], str | None] = _no_obstacle
    ragged: bool = True
    verified: tuple[str, ...] = ()
    saves: tuple[int, ...] = ()

    def why_not(self, tensor: torch.Tensor) -> str | None:
        """The reason why this implementation cannot run for that lead tensor, or None."""
        if self.devices and tensor.device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, the tensor is on {tensor.device.type}"
        return self.missing() or self.obstacle(tensor)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What would run for a call and why; `print` it."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  {backend}: {reason}" for backend, reason in self.reasons.items()])

    __repr__ = __str__


class Chosen(NamedTuple):
    """The implementation that runs for calls like one that was looked at.

    Attributes:
        backend: its name.
        device: that of the lead tensor.
        module: that holds its functions.
        forward, backward: these; backward is None where the gradient is that of forward.
        saves: see `Implementation`.
    """

    backend: str
    device: torch.device
    module: ModuleType
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    saves: tuple[int, ...]


# Operators by public name, in order of registration: the implementations, the preferred one first.
REGISTRY: dict[str, tuple[Implementation, ...]] = {}
_warned: set[tuple[str, str]] = set()
# The implementation that was chosen for calls that are alike: an obstacle looks at device, dtype and shape alone.
_answers: dict[tuple[object, ...], Chosen] = {}
_MOST_ANSWERS = 4096
PLAIN = (torch.Tensor, torch.nn.Parameter)  # others may have shapes that are symbols


def choose(op: str, backend: str, tensor: torch.Tensor, shared: tuple[bool, bool], gradient: bool) -> Chosen:
    """What `resolve` chooses for a lead tensor, whether rows share a prefix and whether that is ragged, and whether a
    gradient is wanted; with its functions. The choice is made once for calls that are alike."""
    key = (op, backend, tensor.device, tensor.dtype, tensor.shape, shared, gradient, cudnn_attention())
    answer = _answers.get(key)
    if answer is None:
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        row = resolve(op, backend, Traits(tensor, *shared, gradient))
        where, _, name = row.module.partition(":")
        module = importlib.import_module(where)
        forward = getattr(module, name or "forward")
        backward = getattr(module, f"{name}_backward" if name else "backward", None)
        answer = _answers[key] = Chosen(row.backend, tensor.device, module, forward, backward, row.saves)
    return answer


def saved_results(op: str, chosen: Chosen | str) -> tuple[int, ...]:
    """The places of the results that the backward pass of an implementation gets."""
    if not isinstance(chosen, str):
        return chosen.saves
    row = _find(op, chosen)
    return () if row is None else row.saves


def resolve(op: str, backend: str, traits: Traits, *, log: bool = True) -> Implementation:
    """The implementation that runs operator `op` for a call, given what the caller asks for. If one that would be taken
    cannot run, that is logged once.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend that does not exist for this operator or cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected one of {BACKENDS}, got {backend!r}")
    if backend != "auto":
        asked = _find(op, backend)
        if asked is None:
            known = ", ".join(_names(op))
            raise RuntimeError(f"{op}: backend={backend!r} does not exist for this operator; there is {known}")
        obstacle = asked.why_not(traits.tensor) or asked.broken(traits.tensor)
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend={backend!r} cannot run: {obstacle}")
        return asked
    for implementation in _in_order(op, traits):
        obstacle = implementation.why_not(traits.tensor) or implementation.broken(traits.tensor)
        if obstacle is None:
            return implementation
        if log and not torch.compiler.is_compiling() and _is_downgrade(op, implementation, traits.tensor):
            warn_once(op, implementation.backend, obstacle)
    raise RuntimeError(f"{op}: no implementation can run; there is {', '.join(_names(op))}")


def forget_answers() -> None:
    """Choose anew from now on, as after a build."""
    _answers.clear()


def _in_order(op: str, traits: Traits) -> Iterator[Implementation]:
    """What "auto" tries."""
    backends = list(_preferred(op))
    family = generation(traits.tensor.device)
    if family:
        backends += [choice.backend for choice in CHOICES.get(op, ()) if choice.fits(family, traits)]
    elif traits.tensor.device.type == "cpu":
        backends.append("cpu")
    for backend in (*backends, "torch", "reference"):
        implementation = _find(op, backend)
        if implementation is not None and (implementation.ragged or not traits.ragged):
            yield implementation


def _is_downgrade(op: str, implementation: Implementation, tensor: torch.Tensor) -> bool:
    """Whether somebody may have counted on an implementation that cannot run: it is for this device, and it is
    installed or was preferred by name."""
    if implementation.devices and tensor.device.type not in implementation.devices:
        return False
    return implementation.missing() is None or implementation.backend in _preferred(op)


def _preferred(op: str) -> tuple[str, ...]:
    """The preferred backends of an operator: its own, then those of all operators unless its own end with "auto"."""
    own = PREFERENCE.get(op, ())
    return own[:-1] if own and own[-1] == "auto" else own + PREFERENCE.get(_EVERY, ())


def _find(op: str, backend: str) -> Implementation | None:
    for implementation in REGISTRY[op]:
        if implementation.backend == backend:
            return implementation
    return None


def _names(op: str) -> tuple[str, ...]:
    return tuple(implementation.backend for implementation in REGISTRY[op])


def warn_once(op: str, backend: str, obstacle: str) -> None:
    """Log why "auto" does not take what it would take otherwise, once for an operator and a backend."""
    if (op, backend) not in _warned:
        _warned.add((op, backend))
        logger.warning("%s: %s is passed over: %s", op, backend, obstacle)


def explain(
    op: str,
    tensor: torch.Tensor,
    backend: str = "auto",
    *,
    prefix: bool = False,
    ragged: bool = False,
    gradient: bool | None = None,
) -> Explanation:
    """What would run for operator `op` on a tensor like this one, and why the others would not.

    Args:
        op: a public operator's name, such as "block_causal_attention".
        tensor: the operator's first tensor, or one of the same dtype, device and shape.
        backend: as passed to the operator.
        prefix: whether the call has a shared prefix.
        ragged: whether that has lengths of its own.
        gradient: whether it wants a gradient; by default whether the tensor does.

    Raises:
        ValueError: unknown operator or backend.
    """
    if op not in REGISTRY:
        raise ValueError(f"explain: op: expected one of {tuple(REGISTRY)}, got {op!r}")
    if gradient is None:
        gradient = tensor.requires_grad and torch.is_grad_enabled()
    traits = Traits(tensor, prefix, ragged, gradient)
    try:
        chosen = resolve(op, backend, traits, log=False).backend
    except RuntimeError as error:
        chosen = f"none: {error}"
    tried = [each.backend for each in _in_order(op, traits)]
    reasons = {}
    for implementation in REGISTRY[op]:
        why_not = implementation.why_not(tensor)
        if implementation.backend in (*tried, backend):
            why_not = why_not or implementation.broken(tensor)
        if implementation.backend == chosen:
            reasons[chosen] = f"chosen{_because(op, chosen, backend, traits)}"
        elif why_not is not None:
            reasons[implementation.backend] = why_not
        elif implementation.backend in tried:
            reasons[implementation.backend] = "can run, another one comes first"
        else:
            reasons[implementation.backend] = "only on explicit request: auto does not take it for such a call"
    return Explanation(op, chosen, reasons)


def _because(op: str, chosen: str, backend: str, traits: Traits) -> str:
    """Why a backend was chosen, where that does not follow from the order of implementations."""
    if backend != "auto":
        return ""
    if chosen in _preferred(op):
        return ": FASTVAR_BACKEND prefers it"
    family = generation(traits.tensor.device)
    if not family or chosen == "reference":
        return ""
    row = next((row for row in CHOICES[op] if row.backend == chosen and row.fits(family, traits)), None)
    if row is None:
        return ": what would come first cannot run"
    commit, implementation = row.measured.get(family), _find(op, chosen)
    if commit and implementation is not None:
        changed = any("before its last change" in where for where in implementation.verified)
        since = "; it has changed since" if changed else ""
        return f": recorded runs of commit {commit} on {family} show that it pays{since}"
    return f": predicted to pay on {family}, not yet measured there"


_COLUMNS = ("operator", "backend", "devices", "tested on")


@dataclass(frozen=True, repr=False)
class SupportMatrix:
    """Every operator and its implementations: rows of (operator, backend, devices, where it has been seen to run). It
    prints as a table, and is one in a notebook."""

    rows: tuple[tuple[str, str, str, str], ...]

    def markdown(self) -> str:
        """The table that the README shows: a line for each operator, and where each implementation was tested."""
        cells: dict[str, list[str]] = {}
        for op, backend, _, tested in self.rows:
            cells.setdefault(op, []).append(f"{backend} ({tested})")
        lines = (f"| {op} | {', '.join(implementations)} |\n" for op, implementations in cells.items())
        return "| operator | implementations, tested on |\n| --- | --- |\n" + "".join(lines)

    def __str__(self) -> str:
        rows = (_COLUMNS, *self.rows)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self.markdown()


def support() -> SupportMatrix:
    """Every operator, its implementations, the devices they are for and where they have been seen to run."""
    return SupportMatrix(
        tuple(
            (op, i.backend, ", ".join(i.devices) or "any", ", ".join(i.verified) or "not yet run")
            for op, implementations in REGISTRY.items()
            for i in implementations
        )
    )
