"""Drawing bits in C++: csrc/sample_bits.cpp."""

from __future__ import annotations

import math

import torch


def bits(
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
    """See the reference, in float32. The draws and the guided logits are the reference's bit for bit. The probability
    of 0, which a draw is compared with, is off by up to 2 roundings, as the reference's is: where both round to
    different sides of the draw, once in some millions, the bits differ."""
    batch, count, size = logits.shape
    cutoff = 0.0 if top_k == 1 else math.inf
    if top_k != 1 and 0 < top_p < 1:
        cutoff = math.log(top_p / (1 - top_p))
    wide = logits.to(torch.float32).contiguous()
    others = None if unconditional is None or guidance == 0 else unconditional.to(torch.float32).contiguous()
    drawn = torch.empty(logits.shape, dtype=torch.bool)
    own, sampled = (torch.empty((batch, count) if log_probs else (0,), dtype=torch.float32) for _ in range(2))
    torch.ops.fastvar_cpu.sample_bits.default(
        wide, others, seeds.contiguous(), guidance, temperature, cutoff, position * size, drawn, own, sampled
    )
    return drawn, own, sampled
