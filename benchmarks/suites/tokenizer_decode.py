"""Feature maps to images with the public tokenizer of FoundationVision/VAR, 109 million parameters at random: a job.

In a setting of float32 all run in it (on a GPU convolutions are in TF32, PyTorch's default), in one of bfloat16 all run
under autocast. torch.compile has our modules with PyTorch's own norms.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastvar
from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled
from benchmarks.shapes import MODELS
from benchmarks.upstream import upstream_tokenizer
from fastvar.models import BSQTokenizer, VQTokenizer, VQTokenizerConfig


def plain_norm(
    norm: nn.GroupNorm, x: torch.Tensor, *, silu: bool = True, shift: torch.Tensor | None = None
) -> torch.Tensor:
    out = norm(x if shift is None else x + shift[:, None, None])
    return F.silu(out) if silu else out


def with_plain_norms(function: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a tokenizer's encoder or decoder with PyTorch's group norms."""

    def call(*arguments: Any, **options: Any) -> Any:
        with patch("fastvar.models.autoencoder.normalised", plain_norm):
            return function(*arguments, **options)

    return call


def build_tokenizer(setting: Setting, device: torch.device) -> VQTokenizer:
    """With weights as large as trained ones, so that images and features vary as theirs do."""
    shape = MODELS[setting["model"]]
    config = VQTokenizerConfig(
        grids=shape.schedule.grids,
        vocab_size=shape.vocab_size,
        code_channels=shape.channels,
        channels=setting["channels"],
    )
    tokenizer = VQTokenizer(config).to(device).eval().requires_grad_(False)
    for weight in tokenizer.parameters():
        if weight.ndim == 4:  # a convolution's
            weight.normal_(std=weight[0].numel() ** -0.5)
    return tokenizer


def decoder_flops(tokenizer: VQTokenizer | BSQTokenizer, batch: int) -> float:
    """Operations of convolutions and attention."""
    channels = tokenizer.decoder.conv_in.in_channels
    feature_map = torch.empty(batch, channels, *tokenizer.schedule.finest, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deepcopy(tokenizer).to("meta").decode_features(feature_map)
    return float(counter.get_total_flops())


def build(setting: Setting, device: torch.device) -> Problem:
    tokenizer, batch, dtype = build_tokenizer(setting, device), setting["batch"], getattr(torch, setting["dtype"])
    low = dtype if dtype != torch.float32 else None
    feature_map = torch.randn(batch, tokenizer.config.code_channels, *tokenizer.schedule.finest, device=device)
    decode = torch.no_grad()(partial(tokenizer.decode_features, dtype=low))
    upstream = upstream_tokenizer(tokenizer)

    @torch.no_grad()
    def theirs(feature_map: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, low, enabled=low is not None):
            return upstream.decoder(upstream.post_quant_conv(feature_map))

    with_compile: Contender = compiled(decode, setting)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        exact = with_plain_norms(tokenizer.decode_features)(feature_map)

    def check(found: torch.Tensor, _: Any) -> float:
        return float((found.float() - exact).square().mean().sqrt() / exact.std())

    weights = sum(t.numel() for part in (tokenizer.decoder, tokenizer.post_quant_conv) for t in part.parameters())
    return Problem(
        {"feature_map": feature_map},
        {
            OURS: decode,
            "FoundationVision/VAR": upstream if isinstance(upstream, str) else theirs,
            "torch.compile": with_compile if isinstance(with_compile, str) else with_plain_norms(with_compile),
        },
        backend=fastvar.explain("group_norm_silu", feature_map.flatten(2).mT).backend,
        check=check,
        limit=5e-2 if low is not None else (1e-2 if device.type == "cuda" else 1e-4),
        flops=decoder_flops(tokenizer, batch),
        bytes=4.0 * (feature_map.numel() + weights + exact.numel()),
    )


SUITE = Suite(
    "tokenizer_decode",
    {
        "tiny": [{"model": "tiny", "batch": 2, "channels": 32, "dtype": "float32"}],
        "cpu": [{"model": "VAR-d16", "batch": 1, "channels": 160, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d16", "batch": 64, "channels": 160, "dtype": "bfloat16"},
            {"model": "VAR-d16", "batch": 64, "channels": 160, "dtype": "float32"},
            {"model": "VAR-d16", "batch": 1, "channels": 160, "dtype": "bfloat16"},
            {"model": "VAR-d36-512", "batch": 16, "channels": 160, "dtype": "bfloat16"},
        ],
    },
    (OURS, "FoundationVision/VAR", "torch.compile"),
    build,
)
