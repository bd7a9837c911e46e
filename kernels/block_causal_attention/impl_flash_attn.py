"""Block-causal attention by the package flash-attn, one call a scale."""

from __future__ import annotations

import torch
from fastvar.kernels.block_causal_attention.by_scale import ByScale
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

# no window, no cap, no slopes: (causal, window_size_left, window_size_right, softcap, alibi_slopes)
_WHOLE = (False, -1, -1, 0.0, None)


class _FlashAttention2:
    name = "flash_attn"
    takes_lengths = False

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, lengths: torch.Tensor | None
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
        lengths: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        _flash_attn_backward(grad, q, k, v, out, lse, dq, dk, dv, 0.0, scale, *_WHOLE, True)  # deterministic
        return dq, dk, dv


_IMPLEMENTATION = ByScale(_FlashAttention2())
forward, backward = _IMPLEMENTATION.forward, _IMPLEMENTATION.backward
