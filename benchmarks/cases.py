"""What a benchmark consists of: suites with settings, and the problems that they build."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Size = Literal["tiny", "cpu", "gpu"]
Setting = Mapping[str, Any]
Contender = Callable[..., Any] | str
OURS = "fastvar"
PASSES = ("forward", "backward", "training")


@dataclass
class Problem:
    """Inputs and those who compete on them.

    Attributes:
        inputs: what every contender is called with, as keywords. A pass with gradients makes leaves of `gradients`.
        contenders: by name functions of the inputs, or why one cannot run here; OURS is what the others are compared
            with.
        backend: what OURS runs; "auto" for a job, which runs many operators.
        gradients: names of the inputs whose gradients a training pass makes; none for forward passes only.
        reference: a function of the inputs in plain PyTorch that runs in any floating dtype: the oracle of `check`.
            None where `check` needs none.
        check: from what a contender returned and what is expected to an error, 0 at best.
        limit: the largest error of a contender that counts as right; None for four times the reference's own in the
            inputs' dtype plus a band of sixteen roundings (four in 16 bits).
        flops: of a forward pass, as far as a sensible implementation needs them; 0 if nobody counted.
        bytes: that a forward pass has to read and write at least; 0 if nobody counted.
        training_flops, training_bytes: of a forward and a backward pass; 0 if nobody counted.
    """

    inputs: dict[str, Any]
    contenders: dict[str, Contender]
    backend: str = "auto"
    gradients: tuple[str, ...] = ()
    reference: Callable[..., Any] | None = None
    check: Callable[[Any, Any], float] | None = None
    limit: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    training_flops: float = 0.0
    training_bytes: float = 0.0


@dataclass(frozen=True)
class Suite:
    """A benchmark of one operator or one job.

    Attributes:
        name: the operator's, or the job's.
        settings: for each size what is measured: JSON values, among them "dtype"; see `setting_name`.
        contenders: all that compete, OURS first.
        build: from a setting, to which "size" is added, and a device to its problem. What it needs beyond torch it
            imports itself.
        training: whether there are passes with gradients.
        graphs: whether forward passes are tried as CUDA graphs too; not those of jobs that wait for the device or make
            gradients inside.
    """

    name: str
    settings: Mapping[Size, Sequence[Setting]]
    contenders: tuple[str, ...]
    build: Callable[[Setting, torch.device], Problem]
    training: bool = False
    graphs: bool = True


def setting_name(setting: Setting) -> str:
    """A setting in one line: "VAR-d16, batch 2, float32"."""
    words = []
    for key, value in setting.items():
        if key != "size" and value is not False:
            words.append(
                str(value) if key in ("model", "dtype", "case") else key if value is True else f"{key} {value}"
            )
    return ", ".join(words)


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order; other parts are left out."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in tensors(value)]
    if isinstance(result, tuple | list):
        return [tensor for value in result for tensor in tensors(value)]
    return []


def relative_error(results: Any, expected: Any) -> float:
    """The largest error of any floating tensor, relative to its largest value; inf for another shape or NaN."""
    worst = 0.0
    for a, b in zip(tensors(results), tensors(expected), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.is_floating_point() and b.numel():
            error = (a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp_min(1e-30)
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst
