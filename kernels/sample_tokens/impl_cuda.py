"""Drawing tokens in CUDA: csrc/sample_tokens.cu."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch


def forward(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    seeds: torch.Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    position: int,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    return draw(
        torch.ops.fastvar_cuda.sample_tokens.default,
        *(logits, unconditional, seeds, guidance, temperature, top_k, top_p, position, log_probs),
    )


def draw(
    op: Any,
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    seeds: torch.Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    position: int,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward` by an op of the extension."""
    batch, count, size = logits.shape
    tokens = torch.empty(batch, count, dtype=torch.int64, device=logits.device)
    own, sampled = (
        torch.empty(tokens.shape if log_probs else (0,), dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    others = logits.new_empty(0) if unconditional is None or guidance == 0 else unconditional
    few = top_k if top_k < size else 0
    quantile = NormalDist().inv_cdf(1 - few / size) if few > 1 else 0.0
    rest = 1 - top_p if 0 < top_p < 1 else 0.0
    op(
        logits, others, seeds, float(1 + guidance), float(guidance), float(temperature), few, rest,
        quantile, NormalDist().pdf(quantile), position, tokens, own, sampled,
    )  # fmt: skip
    return tokens, own, sampled
