"""Attention of one scale by the package flash-attn."""

from __future__ import annotations

import torch
from fastvar.kernels.block_causal_attention.by_scale import Part
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

# no window, no cap, no slopes: (causal, window_size_left, window_size_right, softcap, alibi_slopes)
_WHOLE = (False, -1, -1, 0.0, None)


class FlashAttention2:
    name = "flash_attn"
    takes_lengths = False
    takes_scales = (0, 0)

    def attend(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = _flash_attn_forward(*part.tensors, 0.0, part.scale, *_WHOLE, False)
        return out, lse

    def gradients(
        self, part: Part, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in part.tensors)
        # deterministic
        _flash_attn_backward(grad, *part.tensors, out, lse, dq, dk, dv, 0.0, part.scale, *_WHOLE, True)
        return dq, dk, dv
