"""One step of sampling with tokens of bits, against FoundationVision/Infinity, eager PyTorch and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.bitwise_residual_quantize import codes
from benchmarks.suites.residual_quantize import resampled, to_rows
from benchmarks.upstream import infinity_quantizer
from fastvar.ops import AccumulatedScale, accumulate_bits
from fastvar.schedule import ScaleSchedule

OP = "accumulate_bits"


def eager(bits: torch.Tensor, feature_map: torch.Tensor, *, schedule: ScaleSchedule, scale: int) -> AccumulatedScale:
    """The formula of FoundationVision/Infinity's sampler, with a new feature map."""
    added = codes(bits.mT.unflatten(2, schedule[scale]), feature_map.dtype)
    accumulated = feature_map + resampled(added, schedule.finest, "bilinear")
    return AccumulatedScale(accumulated, to_rows(resampled(accumulated, schedule[scale + 1], "bilinear")))


def upstream(bits: torch.Tensor, schedule: ScaleSchedule, scale: int) -> Contender:
    """FoundationVision/Infinity's `indices_to_codes` and the resampling that follows it in its sampler, which stands
    in the middle of a function. Its bits are integers; that they are so is not timed."""
    built = infinity_quantizer(bits.shape[2], bits.device)
    if isinstance(built, str):
        return built
    quantizer = built[0]
    size, following = (1, *schedule.finest), (1, *schedule[scale + 1])
    sampled = bits.long().unflatten(1, (1, *schedule[scale]))  # [B, 1, h, w, d]

    def run(bits: torch.Tensor, feature_map: torch.Tensor) -> AccumulatedScale:
        added = quantizer.lfq.indices_to_codes(sampled, label_type="bit_label")  # [B, d, 1, h, w]
        mode = quantizer.z_interplote_up
        # a new feature map, as ours; upstream's sampler writes to the old one
        accumulated = feature_map.unsqueeze(2) + F.interpolate(added, size=size, mode=mode)
        rows = F.interpolate(accumulated, size=following, mode=mode).flatten(2).mT
        return AccumulatedScale(accumulated.squeeze(2), rows)

    return run


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, scale = MODELS[setting["model"]], setting["batch"], setting["scale"]
    schedule, depth = shape.schedule, shape.channels
    feature_map = torch.randn(batch, depth, *schedule.finest, device=device).to(dtype)
    bits = torch.rand(batch, schedule.lengths[scale], depth, device=device) < 0.5
    contenders, backend = own(OP, feature_map, partial(accumulate_bits, schedule=schedule, scale=scale))
    plain = partial(eager, schedule=schedule, scale=scale)
    contenders |= {
        "FoundationVision/Infinity": upstream(bits, schedule, scale),
        "eager": plain,
        "torch.compile": compiled(plain, setting),
    }
    following = batch * schedule.lengths[scale + 1] * depth
    return Problem(
        {"bits": bits, "feature_map": feature_map},
        contenders,
        backend=backend,
        reference=plain,
        bytes=4 * (2 * feature_map.numel() + following) + bits.numel(),  # the map is read and written
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "batch": 2, "scale": 1, "dtype": "float32"}],
        "cpu": [
            {"model": "Infinity-2B", "batch": 1, "scale": 4, "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 1, "scale": 11, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "Infinity-2B", "batch": 4, "scale": 4, "dtype": "float32"},
            {"model": "Infinity-2B", "batch": 4, "scale": 11, "dtype": "float32"},
        ],
    },
    (*own_names(OP), "FoundationVision/Infinity", "eager", "torch.compile"),
    build,
)
