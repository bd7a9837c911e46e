"""Multi-scale binary residual quantisation, and its single step for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._extension import extension_implementation
from fastvar.ops._numbers import on_device
from fastvar.ops._operator import Operator
from fastvar.ops.residual_quantize import AccumulatedScale, check_features, check_scale, fake_accumulated, next_grid
from fastvar.schedule import ScaleSchedule


def _implementations(op: str, function: str = "") -> list[Implementation]:
    folder = "fastvar.kernels.residual_quantize"
    return [
        extension_implementation("cuda", f"{folder}.bitwise_extension:{function}", op=op, verified=("H200",)),
        extension_implementation("cpu", f"{folder}.bitwise_extension:{function}", op=op, verified=("CPU",)),
        Implementation("reference", f"{folder}.bitwise:{function}", verified=("CPU", "H200")),
    ]


class QuantizedBits(NamedTuple):
    """What `bitwise_residual_quantize` returns.

    Attributes:
        bits: (B, L, d) bool, the true bits of the residual: the labels.
        feature_map: (B, d, H, W), the sum of what all scales add.
        teacher_forcing: (B, L - n_1, d), the inputs of scales 2 to K.
    """

    bits: torch.Tensor
    feature_map: torch.Tensor
    teacher_forcing: torch.Tensor


class BitwiseQuantizeCall(NamedTuple):
    """A call of `bitwise_residual_quantize`: features (B, d, H, W), flip_probability (K,)."""

    features: torch.Tensor
    flip_probability: torch.Tensor | None
    schedule: ScaleSchedule
    next_input: str
    seed: int
    first_image: int


class AccumulateBitsCall(NamedTuple):
    """A call of `accumulate_bits`: feature_map (B, d, H, W), bits (B, n_k, d) of a grid. A next grid of 0 x 0 stands
    for none."""

    feature_map: torch.Tensor
    bits: torch.Tensor
    height: int
    width: int
    next_height: int
    next_width: int
    next_input: str


def _fake_quantize(call: BitwiseQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features, schedule = call.features, call.schedule
    batch, depth = features.shape[:2]
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        features.new_empty(batch, schedule.num_tokens, depth, dtype=torch.bool),
        features.new_empty(features.shape, dtype=compute),
        features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], depth, dtype=compute),
    )


_QUANTIZE = Operator(
    "bitwise_residual_quantize",
    BitwiseQuantizeCall,
    results=3,
    fake=_fake_quantize,
    implementations=_implementations("bitwise_residual_quantize"),
    choices=[Choice("cuda")],
    differentiable=False,
)
_ACCUMULATE = Operator(
    "accumulate_bits",
    AccumulateBitsCall,
    results=2,
    fake=fake_accumulated,
    implementations=_implementations("accumulate_bits", "accumulate_bits"),
    choices=[Choice("cuda")],
)


def bitwise_residual_quantize(
    features: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    next_input: str = "bilinear",
    flip_probability: Sequence[float] | torch.Tensor | None = None,
    seed: int = 0,
    first_image: int = 0,
    backend: str = "auto",
) -> QuantizedBits:
    """Bits of all scales, the feature map they stand for, and the teacher-forcing inputs, in one go.

    From coarse to fine: the residual is averaged over the grid's bins, a bit is residual > 0 (a zero gives 0), the code
    +-1 / sqrt(d) is upsampled (bilinear, align_corners False), subtracted from the residual and added to the feature
    map. Where a residual is zero but for roundings, as features of zeros make them, implementations may differ in
    its bit. The L2 normalisation of the residual that the public code does first changes no bit.

    With flips (bitwise self-correction) each bit is flipped with its scale's probability before its code is added, so
    that the later labels correct the mistakes of the earlier scales; the labels returned are the bits before the flip.

    Args:
        features: (B, d, H, W) with (H, W) = schedule.finest, floating, any strides.
        schedule: the K grids.
        next_input: how the feature map is brought to the next grid: "bilinear" as Infinity's sampler and training do,
            "area" as its tokenizer does.
        flip_probability: (K,) probabilities of a flip; None for no flips. A tensor must be on the features' device (its
            values are not checked: that would stop the device). A CUDA graph reads a tensor anew at each replay; of a
            sequence it keeps the numbers it was captured with, as it does of the seed.
        seed: of the flips, int64. A flip depends on seed, image, token position and bit alone, not on the batch.
        first_image: the index of the first image, for a batch that is a part of a larger one.
        backend: see `fastvar.support()`.

    Returns:
        QuantizedBits(bits (B, L, d) bool, feature_map (B, d, H, W), teacher_forcing (B, L - n_1, d)), contiguous, the
        latter two in float32. Arithmetic and results are in float64 for float64 features, in float32 for all others.
        None of the results carries a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a schedule that does not end at (H, W), a probability
            outside 0 to 1, an unknown next_input. With FASTVAR_DEBUG=1 also features that are not finite; without, a
            residual that is not a number gives the bit 0.

    Source: BSQ (arXiv 2406.07548); Infinity (arXiv 2412.04431), its bitwise self-correction.
    """
    op = "bitwise_residual_quantize"
    check_features(op, "features", features, schedule)
    _checks.finite(op, "features", features)
    _check_next_input(op, next_input)
    if flip_probability is not None:
        if not isinstance(flip_probability, torch.Tensor):
            if not all(0 <= p <= 1 for p in flip_probability):
                _checks.fail(op, "flip_probability", "probabilities from 0 to 1", flip_probability)
            flip_probability = on_device(list(map(float, flip_probability)), torch.float32, features.device)
        _checks.shape(op, "flip_probability", flip_probability, len(schedule))
        _checks.floating(op, "flip_probability", flip_probability)
        _checks.same_device(op, "features", features, flip_probability=flip_probability)
        flip_probability = flip_probability.detach()
    call = BitwiseQuantizeCall(features.detach(), flip_probability, schedule, next_input, seed, first_image)
    return QuantizedBits(*_QUANTIZE(call, backend))


def accumulate_bits(
    bits: torch.Tensor,
    feature_map: torch.Tensor,
    schedule: ScaleSchedule,
    scale: int,
    *,
    next_input: str = "bilinear",
    backend: str = "auto",
) -> AccumulatedScale:
    """Add the bits of one scale to the feature map and make the input of the next scale.

    Running it over all scales from a feature map of zeros gives what `bitwise_residual_quantize` returns for these
    bits (without flips).

    Args:
        bits: (B, n_k, d) bool, the bits of that scale.
        feature_map: (B, d, H, W) of the scales before, floating, any strides; it is not changed.
        schedule: the K grids; the last one is (H, W).
        scale: k, from 0 to K - 1.
        next_input: "bilinear" or "area", see `bitwise_residual_quantize`.
        backend: see `fastvar.support()`; the lead tensor is the feature map.

    Returns:
        AccumulatedScale(feature_map (B, d, H, W), next_input (B, n_{k+1}, d), None at the last scale), contiguous and
        in float32 (float64 for a float64 feature map). Differentiable in feature_map.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a scale that does not exist, an unknown next_input. With
            FASTVAR_DEBUG=1 also a feature map that is not finite.
    """
    op = "accumulate_bits"
    check_features(op, "feature_map", feature_map, schedule)
    _checks.finite(op, "feature_map", feature_map)
    check_scale(op, schedule, scale)
    _check_next_input(op, next_input)
    _checks.shape(op, "bits", bits, feature_map.shape[0], schedule.lengths[scale], feature_map.shape[1])
    if bits.dtype != torch.bool:
        _checks.fail(op, "bits", "bool", bits.dtype)
    _checks.same_device(op, "feature_map", feature_map, bits=bits)
    call = AccumulateBitsCall(feature_map, bits, *schedule[scale], *next_grid(schedule, scale), next_input)
    accumulated, following = _ACCUMULATE(call, backend)
    return AccumulatedScale(accumulated, following if scale + 1 < len(schedule) else None)


def _check_next_input(op: str, next_input: str) -> None:
    if next_input not in ("bilinear", "area"):
        _checks.fail(op, "next_input", "'bilinear' or 'area'", repr(next_input))
