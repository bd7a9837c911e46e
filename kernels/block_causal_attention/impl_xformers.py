"""Block-causal attention by the package xFormers, one call per scale."""

from __future__ import annotations

import torch
from fastvar.kernels.block_causal_attention.by_scale import ByScale, Part
from xformers.ops.fmha import memory_efficient_attention_backward, memory_efficient_attention_forward_requires_grad


class _XFormers:
    name = "xformers"
    takes_lengths = False
    takes_scales = (0, 0)

    def attend(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = memory_efficient_attention_forward_requires_grad(part.q, part.k, part.v, scale=part.scale)
        return out, lse[:, :, : part.q.shape[1]]  # some of its kernels pad it

    def gradients(
        self, part: Part, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = memory_efficient_attention_backward(grad, out, lse, part.q, part.k, part.v, scale=part.scale)
        return dq, dk, dv


_IMPLEMENTATION = ByScale(_XFormers())
forward, backward = _IMPLEMENTATION.forward, _IMPLEMENTATION.backward
