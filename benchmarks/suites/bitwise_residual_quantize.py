"""All scales of a tokenizer of bits, against FoundationVision/Infinity, the same formula in PyTorch, and torch.compile.

The case "tokenizer" is what Infinity's tokenizer does: no flips, next inputs by area. "self-correction" is what its
training does: flips, next inputs bilinear. There the probability of a flip is 0 for all: the random numbers are drawn
and compared, and yet all must find the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Contender, Problem, Setting, Suite, relative_error
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.residual_quantize import LIMIT, make_features, resampled, to_rows
from benchmarks.upstream import infinity_quantizer
from fastvar.ops import QuantizedBits, bitwise_residual_quantize
from fastvar.schedule import ScaleSchedule

OP = "bitwise_residual_quantize"
NEXT_INPUT = {"tokenizer": "area", "self-correction": "bilinear"}


def eager(
    features: torch.Tensor, flip_probability: torch.Tensor | None, *, schedule: ScaleSchedule, next_input: str
) -> QuantizedBits:
    """The formula of FoundationVision/Infinity, without its normalisation, which changes no bit."""
    feature_map = torch.zeros_like(features)
    bits, inputs = [], []
    for k, grid in enumerate(schedule):
        positive = resampled(features - feature_map, grid, "area") > 0  # [B, d, h, w]
        bits.append(to_rows(positive))
        if flip_probability is not None:
            noise = torch.rand(positive.shape, device=features.device)
            positive = positive ^ (noise < flip_probability[k])
        feature_map = feature_map + resampled(codes(positive, features.dtype), schedule.finest, "bilinear")
        if k + 1 < len(schedule):
            inputs.append(to_rows(resampled(feature_map, schedule[k + 1], next_input)))
    return QuantizedBits(torch.cat(bits, 1), feature_map, torch.cat(inputs, 1))


def codes(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bits (B, d, h, w) as codes of length one, +-1 / sqrt(d)."""
    size = bits.shape[1] ** -0.5
    return bits.to(dtype) * (2 * size) - size


def upstream(case: str, bits: int, schedule: ScaleSchedule, device: torch.device) -> Contender:
    """FoundationVision/Infinity's MultiScaleBSQ, or its BitwiseSelfCorrection, which returns no feature map."""
    built = infinity_quantizer(bits, device, flip_scales=len(schedule), flip_strength=0.0)
    if isinstance(built, str):
        return built
    quantizer, self_correction = built
    grids = [(1, *grid) for grid in schedule]

    def tokenizer(features: torch.Tensor, flip_probability: None) -> QuantizedBits:
        feature_map, _, found, _, _, inputs = quantizer(features, scale_schedule=grids)
        rows = torch.cat([one.flatten(2).mT for one in inputs], 1)  # each (B, d, 1, h, w)
        return QuantizedBits(torch.cat([one.flatten(1, -2) for one in found], 1), feature_map, rows)

    def corrected(features: torch.Tensor, flip_probability: torch.Tensor) -> QuantizedBits:
        inputs, found = self_correction.flip_requant(grids, None, features, features.device)
        return QuantizedBits(torch.cat(found, 1), None, inputs)  # type: ignore[arg-type]

    return tokenizer if case == "tokenizer" else corrected


def right_bit_error(
    features: torch.Tensor, schedule: ScaleSchedule, next_input: str, slack: float = 1e-5
) -> Callable[[Any, Any], float]:
    """A check of `QuantizedBits` of no flips, whose feature map may be None.

    Each bit is held to the residual that the earlier bits of the same run leave, as one of a residual near zero may
    fall either way. The error is the share of wrong bits whose residual is above `slack`, or the relative error of
    feature map and inputs against those made from the bits, whichever is larger.
    """
    wide = torch.float32 if features.is_cuda else torch.float64

    def check(found: QuantizedBits, _: Any) -> float:
        if found.bits.shape != (features.shape[0], schedule.num_tokens, features.shape[1]):
            return float("inf")
        target = features.to(wide)
        feature_map = torch.zeros_like(target)
        wrong, inputs = 0, []
        for k, (start, end) in enumerate(zip(schedule.starts, schedule.ends, strict=True)):
            residual = resampled(target - feature_map, schedule[k], "area")
            bits = found.bits[:, start:end].bool().mT.unflatten(2, schedule[k])
            wrong += int(((bits != (residual > 0)) & (residual.abs() > slack)).sum())
            feature_map = feature_map + resampled(codes(bits, wide), schedule.finest, "bilinear")
            if k + 1 < len(schedule):
                inputs.append(to_rows(resampled(feature_map, schedule[k + 1], next_input)))
        pairs = [(found.feature_map, feature_map), (found.teacher_forcing, torch.cat(inputs, 1))]
        errors = [relative_error(result, expected) for result, expected in pairs if result is not None]
        return max(wrong / found.bits.numel(), *errors, 0.0)

    return check


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, case = MODELS[setting["model"]], setting["batch"], setting["case"]
    schedule, next_input = shape.schedule, NEXT_INPUT[case]
    features = make_features(shape, batch, device).to(dtype)
    flips = torch.zeros(len(schedule), device=device) if case == "self-correction" else None
    contenders, backend = own(
        OP, features, partial(bitwise_residual_quantize, schedule=schedule, next_input=next_input)
    )
    plain = partial(eager, schedule=schedule, next_input=next_input)
    contenders |= {
        "FoundationVision/Infinity": upstream(case, shape.channels, schedule, device),
        "eager": plain,
        "torch.compile": compiled(plain, setting),
    }
    # features are read, feature map, next inputs and bits written
    following = batch * (shape.tokens - schedule.lengths[0]) * shape.channels
    return Problem(
        {"features": features, "flip_probability": flips},
        contenders,
        backend=backend,
        check=right_bit_error(features, schedule, next_input),
        limit=LIMIT,
        bytes=4 * (2 * features.numel() + following) + batch * shape.tokens * shape.channels,
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "case": "tokenizer", "dtype": "float32"},
            {"model": "tiny", "batch": 2, "case": "self-correction", "dtype": "float32"},
        ],
        "cpu": [
            {"model": "Infinity-2B-0.06M", "batch": 2, "case": "tokenizer", "dtype": "float32"},
            {"model": "Infinity-2B-0.06M", "batch": 2, "case": "self-correction", "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 1, "case": "tokenizer", "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 1, "case": "self-correction", "dtype": "float32"},
        ],
        "gpu": [
            {"model": "Infinity-2B", "batch": 4, "case": "tokenizer", "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 4, "case": "self-correction", "dtype": "float32"},
        ],
    },
    (*own_names(OP), "FoundationVision/Infinity", "eager", "torch.compile"),
    build,
)
