"""Attention of a VAR block with a dense mask, as public code has it, and without one: the same numbers."""

import torch
import torch.nn.functional as F

from fastvar import ScaleSchedule
from fastvar.ops import block_causal_attention


def with_a_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """Queries, keys and values (B, L, H, D); a token sees its own scale and the coarser ones."""
    scale = torch.tensor(schedule.scale_of_token)
    mask = scale[:, None] >= scale  # (L, L), which is what the kernel does without
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def main() -> float:
    torch.manual_seed(0)
    schedule = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    q, k, v = torch.randn(1, schedule.num_tokens, 3, 2, 64, requires_grad=True).unbind(2)
    found = block_causal_attention(q, k, v, schedule)
    difference = (found - with_a_mask(q, k, v, schedule)).abs().max().item()
    found.sum().backward()
    print(f"largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
