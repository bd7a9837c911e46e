"""Which implementation of an operator runs, why, and what else there is.

`resolve` is a plain function of the operator, the wish and the lead tensor. A wish that cannot be met raises; only
"auto" moves on to the next implementation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

logger = logging.getLogger("fastvar")

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "sdpa", "flex", "flash_attn", "xformers")


# Read once, when fastvar.ops is first imported, so that a call costs no look-up and stays traceable.
DEFAULT_BACKEND = os.environ.get("FASTVAR_BACKEND", "auto")


def _always(tensor: torch.Tensor) -> str | None:
    return None


def _there() -> str | None:
    return None


def _itself(tensor: torch.Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        backend: its name among BACKENDS.
        module: the module that holds its functions, imported on first use.
        devices: device types it runs on; empty means any.
        obstacle: called with the lead tensor, says why it cannot run (with the remedy), or None if it can.
        missing: says what of it is not installed (with the remedy), or None. Unlike an obstacle this is somebody's
            choice: "auto" passes over it without a word.
        auto: whether "auto" may take it; False until a recorded run shows that it is right and that it pays.
        verified: where it has been seen to run and agree with the reference, for the support matrix.
        faster: called with the lead tensor, names a module that does the same in less time, or None if there is none
            for that tensor.
    """

    backend: str
    module: str
    devices: tuple[str, ...] = ()
    obstacle: Callable[[torch.Tensor], str | None] = _always
    missing: Callable[[], str | None] = _there
    auto: bool = True
    verified: tuple[str, ...] = ()
    faster: Callable[[torch.Tensor], str | None] = _itself

    def why_not(self, tensor: torch.Tensor) -> str | None:
        """The reason why this implementation cannot run for that lead tensor, or None."""
        if self.devices and tensor.device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, the tensor is on {tensor.device.type}"
        return self.missing() or self.obstacle(tensor)


@dataclass(frozen=True)
class Explanation:
    """What would run for a call and why; `print` it."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  {backend}: {reason}" for backend, reason in self.reasons.items()])


# Operators by public name, in order of registration: the implementations, the preferred one first.
REGISTRY: dict[str, tuple[Implementation, ...]] = {}
_warned: set[tuple[str, str]] = set()


def resolve(op: str, backend: str, tensor: torch.Tensor, log: bool = True) -> str:
    """The backend that runs operator `op` for a lead tensor, given the caller's wish; a downgrade is logged once.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend that does not exist for this operator or cannot run here.
    """
    wish = DEFAULT_BACKEND if backend == "auto" else backend
    if wish not in BACKENDS:
        origin = "FASTVAR_BACKEND" if backend == "auto" else "backend"
        raise ValueError(f"{op}: {origin}: expected one of {BACKENDS}, got {wish!r}")
    for implementation in REGISTRY[op]:
        if wish == "auto":
            if not implementation.auto:
                continue
            obstacle = implementation.why_not(tensor)
            if obstacle is None:
                return implementation.backend
            if not log or torch.compiler.is_compiling() or implementation.missing() is not None:
                continue
            if tensor.device.type in implementation.devices:
                warn_once(op, implementation.backend, obstacle)
        elif implementation.backend == wish:
            obstacle = implementation.why_not(tensor)
            if obstacle is not None:
                raise RuntimeError(f"{op}: backend={wish!r} cannot run: {obstacle}")
            return wish
    available = tuple(implementation.backend for implementation in REGISTRY[op])
    raise RuntimeError(f"{op}: backend={wish!r} does not exist for this operator; there is {', '.join(available)}")


def warn_once(op: str, backend: str, obstacle: str) -> None:
    """Log why "auto" does not take what it would take otherwise, once for an operator and a backend."""
    if (op, backend) not in _warned:
        _warned.add((op, backend))
        logger.warning("%s: %s is passed over: %s", op, backend, obstacle)


def explain(op: str, tensor: torch.Tensor, backend: str = "auto") -> Explanation:
    """What would run for operator `op` on a tensor like this one, and why the others would not.

    Args:
        op: a public operator's name, such as "block_causal_attention".
        tensor: the operator's first tensor, or one of the same dtype, device and shape.
        backend: the wish, as passed to the operator.

    Raises:
        ValueError: unknown operator or backend.
    """
    if op not in REGISTRY:
        raise ValueError(f"explain: op: expected one of {tuple(REGISTRY)}, got {op!r}")
    try:
        chosen = resolve(op, backend, tensor, log=False)
    except RuntimeError as error:
        chosen = f"none: {error}"
    reasons = {}
    for implementation in REGISTRY[op]:
        why_not = implementation.why_not(tensor)
        if implementation.backend == chosen:
            module = implementation.faster(tensor)
            reasons[implementation.backend] = "chosen" if module is None else "chosen, in C++"
        elif why_not is not None:
            reasons[implementation.backend] = why_not
        elif not implementation.auto:
            reasons[implementation.backend] = "only on explicit request: no recorded run shows that it pays"
        else:
            reasons[implementation.backend] = "can run, another one comes first"
    return Explanation(op, chosen, reasons)


@dataclass(frozen=True)
class SupportMatrix:
    """Every operator and its implementations: rows of (operator, backend, devices, where it has been seen to run)."""

    rows: tuple[tuple[str, str, str, str], ...]

    def markdown(self) -> str:
        """The table that the README shows."""
        head = "| operator | backend | devices | tested on |\n| --- | --- | --- | --- |\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in self.rows)

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.rows) for i in range(4)]
        return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in self.rows)


def support() -> SupportMatrix:
    """Every operator, its implementations, the devices they are for and where they have been seen to run."""
    return SupportMatrix(
        tuple(
            (op, i.backend, ", ".join(i.devices) or "any", ", ".join(i.verified) or "not yet run")
            for op, implementations in REGISTRY.items()
            for i in implementations
        )
    )
