"""All scales of a VQ tokenizer, against FoundationVision/VAR, the same formula in PyTorch, and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Contender, Problem, Setting, Suite, relative_error
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS, ModelShape
from benchmarks.upstream import upstream_quantizer
from fastvar.ops import QuantizedResidual, ResidualConv, residual_conv_index, residual_quantize
from fastvar.schedule import ScaleSchedule

OP = "residual_quantize"
LIMIT = 1e-3  # of `nearest_code_error`


def eager(
    features: torch.Tensor, codebook: torch.Tensor, phi: ResidualConv, schedule: ScaleSchedule
) -> QuantizedResidual:
    """The formula of FoundationVision/VAR, with the next inputs in the same pass and the codes' norms taken once."""
    norms = codebook.square().sum(1)
    residual, feature_map = features, torch.zeros_like(features)
    tokens, inputs = [], []
    for k, grid in enumerate(schedule):
        rows = to_rows(resampled(residual, grid, "area"))  # [B, n_k, C]
        # without the rows' own norms, which are the same for all codes
        distances = torch.addmm(norms, rows.flatten(0, 1), codebook.T, alpha=-2)
        tokens.append(distances.argmin(1).view(rows.shape[:2]))
        codes = upsampled(tokens[k], codebook, phi.weight[phi.index[k]], phi.bias[phi.index[k]], phi.ratio, k, schedule)
        feature_map = feature_map + codes
        residual = residual - codes
        if k + 1 < len(schedule):
            inputs.append(to_rows(resampled(feature_map, schedule[k + 1], "area")))
    return QuantizedResidual(torch.cat(tokens, 1), feature_map, torch.cat(inputs, 1), None)  # type: ignore[arg-type]


def upsampled(
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    scale: int,
    schedule: ScaleSchedule,
) -> torch.Tensor:
    """What the tokens (B, n) of a scale add to the feature map, with its phi: (B, C, H, W)."""
    codes = F.embedding(tokens, codebook).mT.unflatten(2, schedule[scale])
    codes = resampled(codes, schedule.finest, "bicubic").contiguous()
    return codes * (1 - ratio) + F.conv2d(codes, weight, bias, padding=1) * ratio


def resampled(image: torch.Tensor, grid: Sequence[int], mode: str) -> torch.Tensor:
    return image if image.shape[-2:] == tuple(grid) else F.interpolate(image, size=tuple(grid), mode=mode)


def to_rows(image: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w, C), a view."""
    return image.flatten(2).mT


def upstream(codebook: torch.Tensor, phi: ResidualConv, schedule: ScaleSchedule) -> Contender:
    """The two calls of FoundationVision/VAR's training; the feature map, which training does not need, they do not
    return."""
    quantizer = upstream_quantizer(codebook, phi, schedule)
    if isinstance(quantizer, str):
        return quantizer

    def run(features: torch.Tensor, codebook: torch.Tensor, phi: ResidualConv) -> QuantizedResidual:
        tokens = quantizer.f_to_idxBl_or_fhat(features, to_fhat=False)
        inputs = quantizer.idxBl_to_var_input(tokens)
        return QuantizedResidual(torch.cat(tokens, 1), None, inputs, None)  # type: ignore[arg-type]

    return run


def nearest_code_error(
    features: torch.Tensor, codebook: torch.Tensor, phi: ResidualConv, schedule: ScaleSchedule, slack: float
) -> Callable[[Any, Any], float]:
    """A check of a `QuantizedResidual`, whose feature map and inputs may be None.

    Tokens of two right runs need not be equal: where two codes are as near, either may be taken, and all later tokens
    follow from it. So each token is held to the residual that the earlier ones of the same run leave. The error is the
    share of tokens with a code nearer by more than `slack` times the mean squared distance, or the relative error of
    feature map and inputs against those made from the tokens, whichever is larger.
    """
    wide = torch.float32 if features.is_cuda else torch.float64

    def check(found: QuantizedResidual, _: Any) -> float:
        codes, target, weight, bias = (t.detach().to(wide) for t in (codebook, features, phi.weight, phi.bias))
        norms, feature_map = codes.square().sum(1), torch.zeros_like(target)
        wrong, inputs = 0, []
        for k, (start, end) in enumerate(zip(schedule.starts, schedule.ends, strict=True)):
            rows = to_rows(resampled(target - feature_map, schedule[k], "area")).flatten(0, 1)
            tokens = found.tokens[:, start:end]
            distances = torch.addmm(norms, rows, codes.T, alpha=-2)
            excess = distances.gather(1, tokens.reshape(-1, 1))[:, 0] - distances.amin(1)
            wrong += int((excess > slack * (norms.mean() + rows.square().sum(1).mean())).sum())
            conv = phi.index[k]
            feature_map = feature_map + upsampled(tokens, codes, weight[conv], bias[conv], phi.ratio, k, schedule)
            if k + 1 < len(schedule):
                inputs.append(to_rows(resampled(feature_map, schedule[k + 1], "area")))
        pairs = [(found.feature_map, feature_map), (found.teacher_forcing, torch.cat(inputs, 1))]
        errors = [relative_error(result, expected) for result, expected in pairs if result is not None]
        return max(wrong / found.tokens.numel(), *errors, 0.0)

    def exactly(found: QuantizedResidual, expected: Any) -> float:
        if found.tokens.shape != (features.shape[0], schedule.num_tokens):
            return float("inf")
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return check(found, expected)

    return exactly


def make_quantizer(shape: ModelShape, device: torch.device) -> tuple[torch.Tensor, ResidualConv]:
    """A random codebook and four convolutions, as in the public tokenizers."""
    channels = shape.channels
    weight = torch.randn(4, channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5
    bias = 0.1 * torch.randn(4, channels, device=device)
    phi = ResidualConv(weight, bias, 0.5, residual_conv_index(len(shape.schedule), 4))
    return torch.randn(shape.vocab_size, channels, device=device), phi


def make_features(shape: ModelShape, batch: int, device: torch.device) -> torch.Tensor:
    """Features (B, C, H, W) with something to find at every scale."""
    schedule = shape.schedule
    return sum(  # type: ignore[return-value]
        resampled(torch.randn(batch, shape.channels, *grid, device=device), schedule.finest, "bicubic")
        for grid in schedule
    )


def quantize_flops(shape: ModelShape, batch: int) -> float:
    """Operations of the distances to all codes and of phi; resampling is next to nothing."""
    height, width = shape.schedule.finest
    conv = 2 * 9 * shape.channels**2 * height * width * len(shape.schedule)
    return batch * (2.0 * shape.tokens * shape.vocab_size * shape.channels + conv)


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch = MODELS[setting["model"]], setting["batch"]
    schedule = shape.schedule
    codebook, phi = make_quantizer(shape, device)
    features = make_features(shape, batch, device).to(dtype)
    contenders, backend = own(OP, features, partial(residual_quantize, schedule=schedule))
    plain = partial(eager, schedule=schedule)
    contenders |= {
        "FoundationVision/VAR": upstream(codebook, phi, schedule),
        "eager": plain,
        "torch.compile": compiled(plain, setting),
    }
    # features, codebook and phi are read; tokens, feature map, next inputs and uses of codes written
    read = features.numel() + codebook.numel() + phi.weight.numel()
    written = features.numel() + batch * (shape.tokens - schedule.lengths[0]) * shape.channels
    return Problem(
        {"features": features, "codebook": codebook, "phi": phi},
        contenders,
        backend=backend,
        # the convolutions of others may be in TF32 on a GPU, PyTorch's default
        check=nearest_code_error(features, codebook, phi, schedule, slack=1e-3 if device.type == "cuda" else 1e-5),
        limit=LIMIT,
        flops=quantize_flops(shape, batch),
        bytes=4 * (read + written) + 8 * (batch * shape.tokens + shape.vocab_size),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "batch": 2, "dtype": "float32"}],
        "cpu": [
            {"model": "VAR-d16", "batch": 2, "dtype": "float32"},
            {"model": "VAR-d16", "batch": 8, "dtype": "float32"},
        ],
        "gpu": [
            {"model": model, "batch": batch, "dtype": "float32"}
            for batch in (64, 1)
            for model in ("VAR-d16", "VAR-d36-512")
        ],
    },
    (*own_names(OP), "FoundationVision/VAR", "eager", "torch.compile"),
    build,
)
