"""Block-causal attention by PyTorch's fused scaled dot products, one call per scale.

On GPUs PyTorch says which of its kernels suits a shape (cuDNN's on Hopper and Blackwell, FlashAttention 2's, or the
memory-efficient one) and its users' `sdpa_kernel` is obeyed. The kernels are called by their operators, since
`scaled_dot_product_attention` itself neither gives the log-sum-exp nor takes the one of more keys for the gradient.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from fastvar.kernels.block_causal_attention.by_scale import ByScale, Part
from torch.nn.attention import SDPBackend

_ATEN = torch.ops.aten
# PyTorch keeps cuDNN's plans of a gradient by the sizes and strides of q, k and v and by the dropout, and takes one for
# any layout of the result and its gradient, though it was made for that of the first call: of somebody else, perhaps.
# The bits of minus zero are others than those of zero, so these calls have plans of their own, and always come dense.
_NO_DROPOUT = -0.0


class _ScaledDotProducts:
    name = "sdpa"
    takes_lengths = True
    takes_scales = (0, 0)

    def attend(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        (q, k, v), scale = (t.transpose(1, 2) for t in part.tensors), part.scale
        mask = _mask(part.seen, q, k) if isinstance(part.seen, torch.Tensor) else None
        kernel = _kernel(q, k, v, mask, scale)
        if kernel == "cpu":
            out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        elif kernel == "cudnn":
            out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
        elif kernel == "flash":
            out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        else:
            out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)
            lse = lse[:, :, : q.shape[2]]  # that one is padded
        return out.transpose(1, 2), lse.reshape(q.shape[:3])

    def gradients(
        self, part: Part, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # dense: see _NO_DROPOUT
        grad, q, k, v, out = (t.transpose(1, 2) for t in (grad.contiguous(), *part.tensors, out.contiguous()))
        mask = _mask(part.seen, q, k) if isinstance(part.seen, torch.Tensor) else None
        scale = part.scale
        kernel, rows, columns = _kernel(q, k, v, mask, scale), q.shape[2], k.shape[2]
        if kernel == "cpu":
            gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
            )
        elif kernel == "cudnn":
            lse = lse.view(lse.shape + (1,) * (_cudnn_lse_rank(q.device) - 3))
            seed = torch.empty(2, dtype=torch.int64, device=q.device)  # of the dropout that there is none of
            gradients = _ATEN._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, lse, seed[0], seed[1], None, None, None, rows, columns,
                _NO_DROPOUT, False, scale=scale,
            )  # fmt: skip
        elif kernel == "flash":
            seed = torch.empty(2, dtype=torch.uint64, device=q.device)
            gradients = _ATEN._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, rows, columns, 0.0, False, seed, seed[0], scale=scale
            )
        else:
            lse = F.pad(lse, (0, -rows % 32), value=torch.inf)  # as the forward pass pads it
            seed = torch.empty(2, dtype=torch.int64, device=q.device)
            gradients = _ATEN._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, mask, out, lse, seed[0], seed[1], 0.0, [True, True, True, False], scale=scale
            )[:3]
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return dq, dk, dv


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if mask is not None:
        return "efficient"  # takes any mask
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, scale=scale))
    names = {
        SDPBackend.CUDNN_ATTENTION: "cudnn",
        SDPBackend.FLASH_ATTENTION: "flash",
        SDPBackend.EFFICIENT_ATTENTION: "efficient",
    }
    if chosen not in names:
        raise ValueError(
            "block_causal_attention: q: expected what one of PyTorch's fused kernels takes for backend='sdpa', "
            f"got {q.dtype} with head dimension {q.shape[-1]}, for which PyTorch chooses {chosen.name}; allow "
            "one of them (torch.nn.attention.sdpa_kernel), or set FASTVAR_BACKEND=block_causal_attention=triton"
        )
    return names[chosen]


def _mask(lengths: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, H, n, m), 0 for the first of the keys and minus infinity for the others. Rows are padded in memory, as the
    kernel loads several elements at once."""
    columns = torch.arange(-(-k.shape[2] // 16) * 16, device=q.device)
    hidden = columns >= lengths.clamp(min=1)[:, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    return mask[:, None, None, : k.shape[2]].expand(-1, q.shape[1], q.shape[2], -1)


@cache
def _cudnn_lse_rank(device: torch.device) -> int:
    """cuDNN's log-sum-exp is (B, H, n, 1) or (B, H, n), as the version of PyTorch has it, and goes back as it came."""
    probe = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return _ATEN._scaled_dot_product_cudnn_attention(probe, probe, probe, None, True)[1].ndim


_IMPLEMENTATION = ByScale(_ScaledDotProducts())
forward, backward = _IMPLEMENTATION.forward, _IMPLEMENTATION.backward
