"""What drawn tokens are judged by where rounding decides, and what tokens that are banned owe, for any backend."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastvar.ops import sample_tokens
from tests.helpers.samples import noise


def distance(tokens: torch.Tensor, draws: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """How far draws (M,), uniform numbers, lie outside of what tokens (M,) have of [0, 1) in index order, given the
    logits (M, V) in float64, minus infinity where they are dropped. At most 0 for the right tokens."""
    probs = kept.softmax(-1)
    high = probs.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    low = high - probs.gather(-1, tokens[:, None])[:, 0]
    return torch.maximum(low - draws, draws - high)


def check_banned_tokens(backend: str) -> None:
    """Under guidance, banned in both halves or in the conditional one: as if the vocabulary were that of the others."""
    logits, others = noise(2, 4, 150), noise(2, 4, 150, seed=1)
    allowed = torch.arange(150) % 3 == 1
    banned, both = (torch.where(allowed, t, -math.inf) for t in (logits, others))
    for guidance, settings in [
        (1.5, {}),
        (1.5, {"top_k": 20}),
        (1.5, {"top_k": 100, "top_p": 0.8}),
        (1.5, {"top_k": 1}),
        (-0.5, {"top_p": 0.8}),
        (-1.0, {}),
    ]:
        options: dict[str, Any] = {"guidance": guidance, "seeds": torch.arange(2), "log_probs": True, **settings}
        smaller = {"unconditional": others[..., allowed], "backend": "reference"}
        alone = sample_tokens(logits[..., allowed], **smaller, **options)
        for unconditional in (both, others):
            found = sample_tokens(banned, unconditional=unconditional, backend=backend, **options)
            assert torch.equal(found.tokens, allowed.nonzero()[:, 0][alone.tokens])
            for got, wanted in zip(found[1:], alone[1:], strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=5e-6)
