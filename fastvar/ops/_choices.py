"""What "auto" takes on a GPU: rows that stand in each operator's file beside its implementations.

The rows of an operator are tried in order: the first one that is for a call and whose implementation can run is taken,
then what PyTorch does fast or in bounded memory, then the reference.

A row names the families of GPUs on which recorded runs (benchmarks/data, docs/gpu.md) show that the implementation is
right and faster than what would run otherwise, with the commit that ran. Elsewhere the choice is a prediction, and
`explain` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from fastvar.kernels.common.tiling import card

ANY = 2**63 - 1
HALF = (torch.float16, torch.bfloat16)
HOPPER = ("sm90",)
_NOWHERE: Mapping[str, str] = MappingProxyType({})


class Traits(NamedTuple):
    """What a choice may depend on.

    Attributes:
        tensor: the operator's first one.
        prefix: whether there is a prefix that groups share.
        ragged: whether the prefixes have lengths of their own.
        gradient: whether a gradient is wanted.
    """

    tensor: torch.Tensor
    prefix: bool = False
    ragged: bool = False
    gradient: bool = False


class Choice(NamedTuple):
    """An implementation and the calls for which it is taken.

    Attributes:
        backend: its name.
        measured: where it was seen to pay: families of GPUs (see `fastvar.kernels.common.tiling`), each with the commit
            that ran; the code may have changed since.
        families: of GPUs that it is taken on; empty for all from compute capability 8.0 on.
        dtypes: of the lead tensor; empty for all.
        width: least and largest size of the lead tensor's last dimension: head dimension, channels, vocabulary.
        length: of its second dimension where it has three or more: tokens.
        prefix: whether there is a shared prefix; None for either.
        ragged: whether the prefixes have lengths of their own; None for either.
        gradient: whether a gradient is wanted; None for either.
        cudnn: whether it pays by cuDNN's attention; see `cudnn_attention`.
    """

    backend: str
    measured: Mapping[str, str] = _NOWHERE
    families: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    width: tuple[int, int] = (0, ANY)
    length: tuple[int, int] = (0, ANY)
    prefix: bool | None = None
    ragged: bool | None = None
    gradient: bool | None = None
    cudnn: bool = False

    def fits(self, family: str, traits: Traits) -> bool:
        """Whether the row is for a call on a GPU of this family."""
        tensor = traits.tensor
        length = tensor.shape[1] if tensor.ndim > 2 else 0
        return (
            (not self.families or family in self.families)
            and (not self.dtypes or tensor.dtype in self.dtypes)
            and self.width[0] <= tensor.shape[-1] <= self.width[1]
            and self.length[0] <= length <= self.length[1]
            and self.prefix in (None, traits.prefix)
            and self.ragged in (None, traits.ragged)
            and self.gradient in (None, traits.gradient)
            and (not self.cudnn or cudnn_attention())
        )


# By operator, in order of registration: what the operators' own files say.
CHOICES: dict[str, tuple[Choice, ...]] = {}


def cudnn_attention() -> bool:
    """Whether PyTorch may call cuDNN's attention, whose gradients differ in their last bits from run to run: it is not
    switched off, and nobody asked for deterministic algorithms."""
    return torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()


def generation(device: torch.device) -> str:
    """The family of a GPU that the table is for, or "" for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return ""
    return card(device).family


# Tracing takes the answers as constants: it cannot follow a question to the driver.
for _function in (generation, cudnn_attention):
    _function.__dict__["_dynamo_marked_constant"] = True
