"""Multi-scale residual quantisation with a codebook, and its single step for sampling."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._extension import extension_implementation
from fastvar.ops._operator import Operator
from fastvar.ops._triton import triton_implementation
from fastvar.schedule import ScaleSchedule


class ResidualConv(NamedTuple):
    """The convolutions phi that follow upsampling: phi(h) = (1 - ratio) h + ratio (conv3x3(h) + bias).

    Attributes:
        weight: (N, C, C, 3, 3), N convolutions.
        bias: (N, C).
        ratio: the share of the convolution, 0.5 in the public tokenizers.
        index: (K,) which of the N convolutions each scale uses; see `residual_conv_index`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ratio: float
    index: tuple[int, ...]  # type: ignore[assignment]  # the field hides tuple.index

    def of(self, scale: int) -> ScaleConv:
        """The convolution of a scale."""
        convolution = self.index[scale]
        return ScaleConv(self.weight[convolution], self.bias[convolution], self.ratio)


class ScaleConv(NamedTuple):
    """The convolution phi of one scale: weight (C, C, 3, 3), bias (C,), see `ResidualConv`."""

    weight: torch.Tensor
    bias: torch.Tensor
    ratio: float


class QuantizedResidual(NamedTuple):
    """What `residual_quantize` returns.

    Attributes:
        tokens: (B, L) int64.
        feature_map: (B, C, H, W), the sum of what all scales add: the decoder's input.
        teacher_forcing: (B, L - n_1, C), the inputs of scales 2 to K.
        usage: (V,) int64, how often each code is among the tokens.
    """

    tokens: torch.Tensor
    feature_map: torch.Tensor
    teacher_forcing: torch.Tensor
    usage: torch.Tensor


class AccumulatedScale(NamedTuple):
    """What one step of sampling or teacher forcing returns.

    Attributes:
        feature_map: (B, C, H, W), with this scale added; a new tensor.
        next_input: (B, n_{k+1}, C), the input of the next scale, or None at the last scale.
    """

    feature_map: torch.Tensor
    next_input: torch.Tensor | None


def residual_conv_index(num_scales: int, num_convs: int) -> tuple[int, ...]:
    """Which of N convolutions each of K scales uses: the one whose tick is nearest to k / (K - 1).

    The ticks are N points from 1 / 2N to 1 - 1 / 2N at equal distances (for N = 4, as in the public checkpoints, from
    1 / 12 to 11 / 12). Ten scales share four convolutions as 0, 0, 1, 1, 1, 2, 2, 3, 3, 3.

    Args:
        num_scales: K.
        num_convs: N.

    Returns:
        (K,) indices below N. One scale uses the first convolution.

    Raises:
        ValueError: a count below 1.

    Source: VAR (arXiv 2404.02905), its partially shared phi.
    """
    op = "residual_conv_index"
    for name, count in (("num_scales", num_scales), ("num_convs", num_convs)):
        if count < 1:
            _checks.fail(op, name, "at least 1", count)
    # Ties do occur (2 / 9 lies midway between two of four ticks) and rounding decides them: these are the roundings of
    # numpy.linspace, with which the public checkpoints were trained.
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    begin, end = margin, 1 - margin
    step = (end - begin) / max(num_convs - 1, 1)
    ticks = [*(i * step + begin for i in range(num_convs - 1)), end]
    index = []
    for k in range(num_scales):
        distances = [abs(tick - k / max(num_scales - 1, 1)) for tick in ticks]
        index.append(distances.index(min(distances)))
    return tuple(index)


class QuantizeCall(NamedTuple):
    """A call of `residual_quantize`: features (B, C, H, W), codebook (V, C)."""

    features: torch.Tensor
    codebook: torch.Tensor
    phi: ResidualConv | None
    schedule: ScaleSchedule
    znorm: bool


class AccumulateCall(NamedTuple):
    """A call of `accumulate_scale`: feature_map (B, C, H, W), tokens (B, n_k) of a grid, codebook (V, C). A next grid
    of 0 x 0 stands for none."""

    feature_map: torch.Tensor
    tokens: torch.Tensor
    codebook: torch.Tensor
    phi: ScaleConv | None
    height: int
    width: int
    next_height: int
    next_width: int


def _fake_quantize(call: QuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    features, schedule = call.features, call.schedule
    batch, channels = features.shape[:2]
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        features.new_empty(batch, schedule.num_tokens, dtype=torch.int64),
        features.new_empty(features.shape, dtype=compute),
        features.new_empty(batch, schedule.num_tokens - schedule.lengths[0], channels, dtype=compute),
        features.new_empty(call.codebook.shape[0], dtype=torch.int64),
    )


def fake_accumulated(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A feature map like the call's and the input of its next grid."""
    feature_map = call.feature_map
    compute = torch.promote_types(feature_map.dtype, torch.float32)
    batch, channels = feature_map.shape[:2]
    accumulated = feature_map.new_empty(feature_map.shape, dtype=compute)
    return accumulated, feature_map.new_empty(batch, call.next_height * call.next_width, channels, dtype=compute)


def _implementations(op: str, function: str = "") -> list[Implementation]:
    folder = "fastvar.kernels.residual_quantize"
    return [
        extension_implementation(
            "cuda", f"{folder}.impl_cuda:{function}", op=op, verified=("H200 (before its last change)",)
        ),
        triton_implementation("residual_quantize", function=function, verified=("H200",)),
        extension_implementation("cpu", f"{folder}.impl_cpp:{function}", op=op, verified=("CPU",)),
        Implementation("reference", f"{folder}.reference:{function}", verified=("CPU", "H200")),
    ]


_QUANTIZE = Operator(
    "residual_quantize",
    QuantizeCall,
    results=4,
    fake=_fake_quantize,
    implementations=_implementations("residual_quantize"),
    choices=[Choice("cuda", {"sm90": "b308ba9"}), Choice("triton")],
    differentiable=False,
)
_ACCUMULATE = Operator(
    "accumulate_scale",
    AccumulateCall,
    results=2,
    fake=fake_accumulated,
    implementations=_implementations("accumulate_scale", "accumulate_scale"),
    choices=[Choice("cuda"), Choice("triton")],
)


def residual_quantize(
    features: torch.Tensor,
    codebook: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    phi: ResidualConv | None = None,
    znorm: bool = False,
    backend: str = "auto",
) -> QuantizedResidual:
    """Tokens of all scales, the feature map they stand for, and the teacher-forcing inputs, in one go.

    From coarse to fine: the residual is averaged over the grid's bins, each mean takes the nearest code, the codes are
    upsampled (bicubic, a = -0.75, align_corners False, no antialiasing), pass phi, and are subtracted from the residual
    and added to the feature map. At the finest grid there is no resampling, but phi still applies.

    Args:
        features: (B, C, H, W) with (H, W) = schedule.finest, floating, any strides.
        codebook: (V, C), any floating dtype.
        schedule: the K grids.
        phi: the convolutions after upsampling; None for none.
        znorm: the nearest code is the one with the largest cosine rather than the smallest distance; what is added
            is the code itself in both cases.
        backend: see `fastvar.support()`.

    Returns:
        QuantizedResidual(tokens (B, L) int64, feature_map (B, C, H, W), teacher_forcing (B, L - n_1, C), usage (V,)
        int64), contiguous. Arithmetic, feature map and inputs are in float64 for float64 features, in float32 for all
        others. Ties go to the lowest index. None of the results carries a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a schedule that does not end at (H, W). With
            FASTVAR_DEBUG=1 also numbers that are not finite; without, tokens of such features, or of cosines of vectors
            whose squared length is past float32, are indices of the codebook nevertheless.

    Source: VAR (arXiv 2404.02905), algorithm 1.
    """
    op = "residual_quantize"
    check_features(op, "features", features, schedule)
    _checks.finite(op, "features", features)
    _check_codebook(op, "features", features, codebook)
    if phi is not None:
        _check_phi(op, "features", features, phi, len(schedule))
        phi = ResidualConv(phi.weight.detach(), phi.bias.detach(), phi.ratio, tuple(phi.index))
    call = QuantizeCall(features.detach(), codebook.detach(), phi, schedule, znorm)
    return QuantizedResidual(*_QUANTIZE(call, backend))


def accumulate_scale(
    tokens: torch.Tensor,
    feature_map: torch.Tensor,
    codebook: torch.Tensor,
    schedule: ScaleSchedule,
    scale: int,
    *,
    phi: ResidualConv | None = None,
    backend: str = "auto",
) -> AccumulatedScale:
    """Add the tokens of one scale to the feature map and make the input of the next scale.

    Running it over all scales from a feature map of zeros gives what `residual_quantize` returns for these tokens.

    Args:
        tokens: (B, n_k) int64 or int32, the tokens of that scale.
        feature_map: (B, C, H, W) of the scales before, floating, any strides; it is not changed.
        codebook: (V, C), any floating dtype.
        schedule: the K grids; the last one is (H, W).
        scale: k, from 0 to K - 1.
        phi: the convolutions after upsampling; None for none.
        backend: see `fastvar.support()`; the lead tensor is the feature map.

    Returns:
        AccumulatedScale(feature_map (B, C, H, W), next_input (B, n_{k+1}, C), None at the last scale), contiguous and
        in float32 (float64 for a float64 feature map). Differentiable in feature_map, codebook, phi.weight and
        phi.bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a scale that does not exist. With FASTVAR_DEBUG=1 also
            numbers that are not finite and tokens that do not exist; without, such a token is an error on CPUs (which
            one depends on the implementation), and on GPUs, where nothing waits for it, stands for the first or the
            last code in CUDA and Triton.
    """
    op = "accumulate_scale"
    check_features(op, "feature_map", feature_map, schedule)
    _checks.finite(op, "feature_map", feature_map)
    check_scale(op, schedule, scale)
    _checks.shape(op, "tokens", tokens, feature_map.shape[0], schedule.lengths[scale])
    _checks.integer(op, "tokens", tokens)
    _checks.same_device(op, "feature_map", feature_map, tokens=tokens)
    _check_codebook(op, "feature_map", feature_map, codebook)
    _checks.indices(op, "tokens", tokens, codebook.shape[0])
    convolution = None
    if phi is not None:
        _check_phi(op, "feature_map", feature_map, phi, len(schedule))
        convolution = phi.of(scale)
    grids = (*schedule[scale], *next_grid(schedule, scale))
    accumulated, next_input = _ACCUMULATE(AccumulateCall(feature_map, tokens, codebook, convolution, *grids), backend)
    return AccumulatedScale(accumulated, next_input if scale + 1 < len(schedule) else None)


def check_features(op: str, argument: str, features: torch.Tensor, schedule: ScaleSchedule) -> None:
    """Check that features are floating, (B, C, H, W), and of the schedule's finest grid."""
    _checks.schedule(op, schedule)
    _checks.floating(op, argument, features)
    _checks.shape(op, argument, features, "B", "C", *schedule.finest)


def check_scale(op: str, schedule: ScaleSchedule, scale: int) -> None:
    """Check that a scale exists."""
    if not 0 <= scale < len(schedule):
        _checks.fail(op, "scale", f"0 to {len(schedule) - 1}", scale)


def next_grid(schedule: ScaleSchedule, scale: int) -> tuple[int, int]:
    """The grid after a scale, 0 x 0 after the last."""
    return schedule[scale + 1] if scale + 1 < len(schedule) else (0, 0)


def _check_codebook(op: str, argument: str, features: torch.Tensor, codebook: torch.Tensor) -> None:
    _checks.shape(op, "codebook", codebook, "V", features.shape[1])
    _checks.floating(op, "codebook", codebook)
    _checks.same_device(op, argument, features, codebook=codebook)
    if codebook.shape[0] == 0:
        _checks.fail(op, "codebook", "at least one code", tuple(codebook.shape))
    _checks.finite(op, "codebook", codebook)


def _check_phi(op: str, argument: str, features: torch.Tensor, phi: ResidualConv, num_scales: int) -> None:
    channels = features.shape[1]
    _checks.shape(op, "phi.weight", phi.weight, "N", channels, channels, 3, 3)
    _checks.shape(op, "phi.bias", phi.bias, phi.weight.shape[0], channels)
    _checks.floating(op, "phi.weight", phi.weight)
    _checks.floating(op, "phi.bias", phi.bias)
    _checks.same_device(op, argument, features, **{"phi.weight": phi.weight, "phi.bias": phi.bias})
    _checks.finite(op, "phi.weight", phi.weight)
    _checks.finite(op, "phi.bias", phi.bias)
    if len(phi.index) != num_scales or not all(0 <= i < phi.weight.shape[0] for i in phi.index):
        _checks.fail(op, "phi.index", f"{num_scales} indices from 0 to {phi.weight.shape[0] - 1}", phi.index)
