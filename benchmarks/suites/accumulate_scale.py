"""One step of sampling or teacher forcing with a VQ tokenizer, against FoundationVision/VAR, eager PyTorch and
torch.compile.

Training passes take gradients of feature map, codebook and phi, as the tokenizer's own training does.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.residual_quantize import make_quantizer, resampled, to_rows, upsampled
from benchmarks.upstream import upstream_quantizer
from fastvar.ops import AccumulatedScale, ResidualConv, accumulate_scale
from fastvar.schedule import ScaleSchedule

OP = "accumulate_scale"


def eager(
    tokens: torch.Tensor,
    feature_map: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    *,
    schedule: ScaleSchedule,
    scale: int,
    ratio: float,
    conv: int,
) -> AccumulatedScale:
    """The formula of FoundationVision/VAR, with a new feature map."""
    codes = upsampled(tokens, codebook, phi_weight[conv], phi_bias[conv], ratio, scale, schedule)
    accumulated = feature_map + codes
    return AccumulatedScale(accumulated, to_rows(resampled(accumulated, schedule[scale + 1], "area")))


def upstream(codebook: torch.Tensor, phi: ResidualConv, schedule: ScaleSchedule, scale: int) -> Contender:
    """What FoundationVision/VAR's sampler does. It writes to the feature map, so that each call is given a copy."""
    quantizer = upstream_quantizer(codebook, phi, schedule)
    if isinstance(quantizer, str):
        return quantizer

    def run(
        tokens: torch.Tensor,
        feature_map: torch.Tensor,
        codebook: torch.Tensor,
        phi_weight: torch.Tensor,
        phi_bias: torch.Tensor,
    ) -> AccumulatedScale:
        if torch.is_grad_enabled():
            raise NotImplementedError("its sampler's step has no gradients")
        codes = quantizer.embedding(tokens).transpose(1, 2).unflatten(2, schedule[scale])
        found = quantizer.get_next_autoregressive_input(scale, len(schedule), feature_map.clone(), codes)
        return AccumulatedScale(found[0], to_rows(found[1]))

    return run


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, scale = MODELS[setting["model"]], setting["batch"], setting["scale"]
    schedule, channels = shape.schedule, shape.channels
    codebook, phi = make_quantizer(shape, device)
    feature_map = torch.randn(batch, channels, *schedule.finest, device=device).to(dtype)
    tokens = torch.randint(shape.vocab_size, (batch, schedule.lengths[scale]), device=device)

    def ours(
        tokens: torch.Tensor,
        feature_map: torch.Tensor,
        codebook: torch.Tensor,
        phi_weight: torch.Tensor,
        phi_bias: torch.Tensor,
        backend: str,
    ) -> AccumulatedScale:
        convs = ResidualConv(phi_weight, phi_bias, phi.ratio, phi.index)
        return accumulate_scale(tokens, feature_map, codebook, schedule, scale, phi=convs, backend=backend)

    plain = partial(eager, schedule=schedule, scale=scale, ratio=phi.ratio, conv=phi.index[scale])
    contenders, backend = own(OP, feature_map, ours)
    contenders |= {
        "FoundationVision/VAR": upstream(codebook, phi, schedule, scale),
        "eager": plain,
        "torch.compile": compiled(plain, setting),
    }
    # one phi and the tokens' codes are read
    conv = phi.weight[0].numel()
    gathered = min(tokens.numel(), shape.vocab_size) * channels
    following = batch * schedule.lengths[scale + 1] * channels
    flops = 2.0 * batch * schedule.lengths[-1] * conv  # of phi
    bytes_ = 4 * (2 * feature_map.numel() + gathered + conv + following) + 8 * tokens.numel()
    # backward: two incoming gradients and the codes are read; gradients of feature map, codebook and all phis written
    gradients = 2 * feature_map.numel() + following + gathered + 2 * conv + codebook.numel() + phi.weight.numel()
    return Problem(
        {
            "tokens": tokens,
            "feature_map": feature_map,
            "codebook": codebook,
            "phi_weight": phi.weight,
            "phi_bias": phi.bias,
        },
        contenders,
        backend=backend,
        gradients=("feature_map", "codebook", "phi_weight", "phi_bias"),
        reference=plain,
        # convolutions may be in TF32 on a GPU, PyTorch's default, those of the reference too
        limit=3e-3 if device.type == "cuda" else None,
        flops=flops,
        bytes=bytes_,
        training_flops=3 * flops,  # and the gradients of phi's input and weight
        training_bytes=bytes_ + 4 * gradients + 8 * tokens.numel(),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "batch": 2, "scale": 1, "dtype": "float32"}],
        "cpu": [{"model": "VAR-d16", "batch": 2, "scale": 8, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d16", "batch": 64, "scale": 2, "dtype": "float32"},
            {"model": "VAR-d16", "batch": 64, "scale": 8, "dtype": "float32"},
            {"model": "VAR-d36-512", "batch": 32, "scale": 8, "dtype": "float32"},
        ],
    },
    (*own_names(OP), "FoundationVision/VAR", "eager", "torch.compile"),
    build,
    training=True,
)
