"""A transformer block of Infinity: VAR's with rotary positions and cross-attention to a text."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fastvar.models.infinity_config import InfinityConfig
from fastvar.models.text import Places, TextAttention, TextKV
from fastvar.models.var_block import Attend, Block, Rope
from fastvar.ops import gated_residual_norm, rope_tables
from fastvar.schedule import PRESETS, Grid, ScaleSchedule


def rotation_grid(schedule: ScaleSchedule) -> Grid:
    """The grid (height, width) on which the tokens of a schedule have their rotary positions: for Infinity's own
    schedules the finest of the 1M-pixel budget, whatever theirs; for any other its own finest."""
    return _ROTATION_GRIDS.get(schedule, schedule.finest)


_ROTATION_GRIDS = {
    schedule: PRESETS[f"infinity-1M-{name.rsplit('-', 1)[1]}"].finest
    for name, schedule in PRESETS.items()
    if name.startswith("infinity-")
}


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def rotations(schedule: ScaleSchedule, head_dim: int, device: torch.device) -> Rope:
    """The rotary tables of a schedule, cos and sin (L, head_dim / 2) float32; made once."""
    return rope_tables(schedule, head_dim, finest=rotation_grid(schedule), device=device)


@cache  # nothing is ever dropped: a CUDA graph may read it
@torch.inference_mode(False)
def scale_indices(schedule: ScaleSchedule, device: torch.device) -> torch.Tensor:
    """The scale of each token, (L,) int64; made once."""
    return torch.tensor(schedule.scale_of_token, device=device)


class TextBlock(Block):
    """Self-attention, cross-attention to the text and MLP."""

    def __init__(self, config: InfinityConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)  # type: ignore[arg-type]  # it has the fields that a block needs
        self.text_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.text_attention = TextAttention(config.embed_dim, config.embed_dim, config.num_heads)

    def read_text(self, packed: torch.Tensor, where: Places) -> TextKV:
        """What this block's tokens see of the projected texts (sum of lengths, C)."""
        return self.text_attention.keys_and_values(packed, where)

    def modulate(self, activated: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block.modulate`, with three rows more: what the norm before the cross-attention, which has weights of its
        own, adds to 1 and to 0, and the gate after it, which is 1. (B, 9, C), float32 at least."""
        rows, bias = super().modulate(activated, shared)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        weight = self.text_norm.weight.to(dtype)
        own = torch.stack([weight - 1, self.text_norm.bias.to(dtype), torch.ones_like(weight)])
        return torch.cat([rows.to(dtype), own.expand(len(rows), -1, -1)], 1), bias

    def mix(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        modulation: torch.Tensor,
        attend: Attend,
        bias: torch.Tensor | None = None,
        text: TextKV | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block.mix`, with the cross-attention to the text in between."""
        assert text is not None
        gate, _, _, scale, _, shift, text_scale, text_shift, one = modulation.unbind(1)
        h = self._dropped(self.proj(attend(self, *self.project(h, bias)).flatten(2)))
        x, h = gated_residual_norm(x, h, gate, text_scale, text_shift, eps=self.eps)
        x, h = gated_residual_norm(x, self.text_attention(h, text), one, scale, shift, eps=self.eps)
        return x, self._mlp(h)
