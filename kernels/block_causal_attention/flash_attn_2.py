"""Attention of one scale by the package flash-attn."""

from __future__ import annotations

import torch
from fastvar.kernels.block_causal_attention.by_scale import Seen
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

# no window, no cap, no slopes: (causal, window_size_left, window_size_right, softcap, alibi_slopes)
_WHOLE = (False, -1, -1, 0.0, None)


class FlashAttention2:
    name = "flash_attn"
    takes_lengths = False
    takes_scales = (0, 0)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, *_WHOLE, False)
        return out, lse

    def gradients(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        seen: Seen,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        _flash_attn_backward(grad, q, k, v, out, lse, dq, dk, dv, 0.0, scale, *_WHOLE, True)  # deterministic
        return dq, dk, dv
