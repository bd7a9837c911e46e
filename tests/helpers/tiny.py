"""Models of a few thousand parameters whose every part matters: no weight is zero or nearly so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvar.models import (
    VAR,
    BSQTokenizer,
    BSQTokenizerConfig,
    Infinity,
    InfinityConfig,
    TextFeatures,
    VARConfig,
    VQTokenizer,
    VQTokenizerConfig,
)

SQUARES = ((1, 1), (2, 2), (3, 3))
RECTANGLES = ((1, 2), (2, 3))
CODES, CHANNELS = 32, 8


def filled(module: nn.Module, seed: int) -> nn.Module:
    """The same module with normal noise in all parameters, scaled by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            gain = (
                1.0 if name.split(".")[-2:-1] in (["norm1"], ["norm2"], ["norm"], ["norm_out"], ["text_norm"]) else 0.0
            )
            noise = noise * 0.2 + gain * name.endswith("weight")
        elif "embed" in name or name == "codebook":
            noise = noise * 0.5
        else:
            noise = noise / (parameter[0].numel() ** 0.5)
        parameter.data.copy_(noise)
    return module


def tiny_tokenizer(grids: tuple[tuple[int, int], ...] = SQUARES, seed: int = 1, **fields: Any) -> VQTokenizer:
    """Images of twice the finest grid's size."""
    shape = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4, "residual_convs": 2}
    config = VQTokenizerConfig(grids=grids, vocab_size=CODES, code_channels=CHANNELS, **{**shape, **fields})
    tokenizer = VQTokenizer(config)
    filled(tokenizer, seed)
    return tokenizer.eval()


def tiny_var(grids: tuple[tuple[int, int], ...] = SQUARES, seed: int = 0, **fields: Any) -> VAR:
    """A VAR in evaluation mode with its tokenizer."""
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    config = VARConfig(grids=grids, vocab_size=CODES, code_channels=CHANNELS, **{**shape, **fields})
    var = VAR(config, tiny_tokenizer(grids))
    filled(var, seed)
    return var.eval()


def tiny_bits(grids: tuple[tuple[int, int], ...] = SQUARES, seed: int = 1, **fields: Any) -> BSQTokenizer:
    """Images of twice the finest grid's size, four times with patches."""
    shape = {"bits": 8, "channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
    tokenizer = BSQTokenizer(BSQTokenizerConfig(grids=grids, **{**shape, **fields}))
    filled(tokenizer, seed)
    return tokenizer.eval()


def tiny_infinity(
    grids: tuple[tuple[int, int], ...] = SQUARES, seed: int = 0, patchify: bool = False, **fields: Any
) -> Infinity:
    """An Infinity in evaluation mode with its tokenizer."""
    shape = {"depth": 3, "embed_dim": 32, "num_heads": 2, "bits": 8, "text_channels": 12, "text_length": 6}
    config = InfinityConfig(grids=grids, pool_heads=4, **{**shape, **fields})
    net = Infinity(config, tiny_bits(grids, bits=config.bits, patchify=patchify))
    filled(net, seed)
    return net.eval()


def some_texts(lengths: tuple[int, ...] = (3, 1, 6, 2), seed: int = 5) -> TextFeatures:
    """Features of 12 channels."""
    return TextFeatures(torch.randn(sum(lengths), 12, generator=torch.Generator().manual_seed(seed)), lengths)


def some_bits(net: Infinity | BSQTokenizer, count: int, seed: int = 3) -> torch.Tensor:
    """(count, L, d) bits."""
    shape = (count, net.schedule.num_tokens, net.config.bits)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def unconditional(var: VAR) -> VAR:
    """A copy for which every class is "no condition"."""
    copy = var.clone()
    with torch.no_grad():
        copy.class_embed.weight[:] = copy.class_embed.weight[-1]
    return copy


def some_tokens(var: VAR | VQTokenizer, count: int, seed: int = 3) -> torch.Tensor:
    """(count, L) tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CODES, (count, var.schedule.num_tokens), generator=generator)


def some_subjects(var: VAR, count: int, seed: int = 4) -> torch.Tensor:
    """(count, L, C), the pyramids of some tokens."""
    return var.tokenizer.pyramid(some_tokens(var, count, seed))
