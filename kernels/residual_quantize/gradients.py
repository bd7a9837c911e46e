"""Gradients of accumulate_scale, for implementations whose own forward cannot be differentiated.

Resampling is a product with a matrix for each axis, forwards and backwards: such sums have an order on every device.
The convolutions are in float32, as forwards, and in a fixed order too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall


def accumulate_scale_backward(
    call: AccumulateCall, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> dict[str, torch.Tensor]:
    """Gradients of feature_map, codebook, phi.weight and phi.bias, as far as they are needed, in float32. A token that
    does not exist stands for the first or the last code, as forwards."""
    feature_map, codebook, phi, (grad, following) = call.feature_map, call.codebook, call.phi, grads
    grid, next_grid = (call.height, call.width), (call.next_height, call.next_width)
    tokens = call.tokens.clamp(0, len(codebook) - 1)
    size = feature_map.shape[-2:]
    if grad is None:
        total = torch.zeros(feature_map.shape, dtype=torch.float32, device=feature_map.device)
    else:  # a copy, as it is added to
        total = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if following is not None and following.shape[1]:
        image = following.to(torch.float32).mT.unflatten(2, next_grid)  # [B, C, h', w']
        total += _resampled(image, [m.T for m in _axes(size, next_grid, "area", total)])
    gradients, incoming = {"feature_map": total.to(feature_map.dtype)}, total  # [B, C, H, W], of what is upsampled
    upwards = _axes(grid, size, "bicubic", total)
    if phi is not None and (needs.codebook or needs.phi_weight or needs.phi_bias):
        convolution = phi.weight.to(torch.float32)
        codes = total  # its values count for the gradient of the weight alone
        if needs.phi_weight:
            gathered = F.embedding(tokens, codebook.to(torch.float32)).mT.unflatten(2, grid)
            codes = _resampled(gathered, upwards)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            blurred, weight, bias = torch.ops.aten.convolution_backward(
                total * phi.ratio, codes, convolution, [len(convolution)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                [needs.codebook, needs.phi_weight, needs.phi_bias],
            )  # fmt: skip
        if needs.phi_weight:
            gradients["phi_weight"] = weight.to(phi.weight.dtype).contiguous()
        if needs.phi_bias:
            gradients["phi_bias"] = bias.to(phi.bias.dtype).contiguous()
        if needs.codebook:
            incoming = blurred.add_(total, alpha=1 - phi.ratio)
    if needs.codebook:
        rows = _resampled(incoming, [m.T for m in upwards]).flatten(2).mT  # [B, n, C]
        book = torch.ops.aten.embedding_dense_backward(rows.contiguous(), tokens, len(codebook), -1, False)
        gradients["codebook"] = book.to(codebook.dtype).contiguous()
    return gradients


def _resampled(image: torch.Tensor, axes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (B, C, h, w) times the matrices (H, h) and (W, w)."""
    return (axes[0] @ image @ axes[1].T).contiguous()


def _axes(sizes: Sequence[int], out: Sequence[int], mode: str, like: torch.Tensor) -> list[torch.Tensor]:
    """For both axes what each of `sizes` cells adds to each of `out`, (out, size)."""
    if tuple(sizes) == tuple(out):
        mode = "nearest"
    matrices = []
    for size, target in zip(sizes, out, strict=True):
        cells = torch.eye(size, dtype=like.dtype, device=like.device)
        matrices.append(F.interpolate(cells[None, :, None], size=(1, target), mode=mode)[0, :, 0].T)
    return matrices
