"""Images to tokens with the public tokenizer of FoundationVision/VAR, 109 million parameters at random: a job.

All run in float32, as upstream's training has it (on a GPU convolutions are in TF32, PyTorch's default).
torch.compile has our modules with PyTorch's own norms.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastvar
from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled
from benchmarks.shapes import MODELS
from benchmarks.suites.residual_quantize import LIMIT, eager, nearest_code_error, quantize_flops
from benchmarks.suites.tokenizer_decode import build_tokenizer, with_plain_norms
from benchmarks.upstream import upstream_tokenizer
from fastvar.models import VQTokenizer
from fastvar.ops import QuantizedResidual


def upstream(tokenizer: VQTokenizer) -> Contender:
    built = upstream_tokenizer(tokenizer)
    return built if isinstance(built, str) else lambda images: torch.cat(built.img_to_idxBl(images), 1)


def encoder_flops(tokenizer: VQTokenizer, images: torch.Tensor) -> float:
    """Operations of convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deepcopy(tokenizer).to("meta").encode_features(images.to("meta"))
    return float(counter.get_total_flops())


def build(setting: Setting, device: torch.device) -> Problem:
    shape, batch = MODELS[setting["model"]], setting["batch"]
    tokenizer = build_tokenizer(setting, device)
    phi = tokenizer.phi
    assert phi is not None
    images = torch.rand(batch, 3, *tokenizer.config.image_size, device=device) * 2 - 1

    @torch.no_grad()
    def plain(images: torch.Tensor) -> torch.Tensor:
        return eager(tokenizer.encode_features(images), tokenizer.codebook, phi, tokenizer.schedule).tokens

    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = with_plain_norms(tokenizer.encode_features)(images)
    nearest = nearest_code_error(
        features,
        tokenizer.codebook,
        phi,
        tokenizer.schedule,
        slack=5e-3 if device.type == "cuda" else 1e-4,  # the features are only as exact as the encoder's convolutions
    )

    def check(tokens: torch.Tensor, expected: Any) -> float:
        return nearest(QuantizedResidual(tokens, None, None, None), expected)  # type: ignore[arg-type]

    with_compile: Contender = compiled(plain, setting)
    weights = sum(t.numel() for part in (tokenizer.encoder, tokenizer.quant_conv) for t in part.parameters())
    weights += tokenizer.codebook.numel() + phi.weight.numel()
    return Problem(
        {"images": images},
        {
            OURS: tokenizer.encode,
            "FoundationVision/VAR": upstream(tokenizer),
            "torch.compile": with_compile if isinstance(with_compile, str) else with_plain_norms(with_compile),
        },
        backend=fastvar.explain("residual_quantize", features).backend,
        check=check,
        limit=LIMIT,
        flops=encoder_flops(tokenizer, images) + quantize_flops(shape, batch),
        bytes=4.0 * (images.numel() + weights) + 8 * batch * shape.tokens,
    )


SUITE = Suite(
    "tokenizer_encode",
    {
        "tiny": [{"model": "tiny", "batch": 2, "channels": 32, "dtype": "float32"}],
        "cpu": [{"model": "VAR-d16", "batch": 1, "channels": 160, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d16", "batch": 64, "channels": 160, "dtype": "float32"},
            {"model": "VAR-d36-512", "batch": 16, "channels": 160, "dtype": "float32"},
        ],
    },
    (OURS, "FoundationVision/VAR", "torch.compile"),
    build,
)
