"""Small policies and rewards for the tests of reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvar.models import VAR, CharacterTextEncoder, Infinity, VARConfig
from tests.helpers.tiny import tiny_infinity, tiny_tokenizer

GRIDS = ((1, 1), (2, 2), (3, 3))


def policy(seed: int = 0, grids: tuple[tuple[int, int], ...] = GRIDS) -> VAR:
    """Two blocks over three scales of 14 tokens in all, texts of one digit, a head that has opinions."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(grids=grids)
    config = VARConfig(
        grids=grids,
        depth=2,
        embed_dim=32,
        num_heads=2,
        vocab_size=tokenizer.config.vocab_size,
        code_channels=tokenizer.config.code_channels,
        num_classes=0,
        text_length=1,
        gate_init=1.0,
    )
    var = VAR(config, tokenizer).eval()
    with torch.no_grad():
        var.head.weight.normal_(std=0.3)
    return var


def bitwise_policy(seed: int = 0, **fields: Any) -> Infinity:
    """Tokens of bits over the same scales, texts of up to eleven characters."""
    net = tiny_infinity(seed=seed, depth=2, text_channels=16, text_length=12, **fields)
    net.text_encoder = CharacterTextEncoder(16, max_length=12)
    return net


def redness(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
    return 10 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
