"""Gradients of accumulate_scale, for implementations whose own forward cannot be differentiated.

Resampling is a product with a matrix for each axis, forwards and backwards: such sums have an order on every device.
The convolutions are in float32, as forwards, and in a fixed order too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def accumulate_scale_backward(
    grads: Sequence[torch.Tensor | None],
    feature_map: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    height: int,
    width: int,
    next_height: int,
    next_width: int,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of feature_map, codebook, phi_weight and phi_bias, as far as they are needed, in float32. A token that
    does not exist stands for the first or the last code, as forwards."""
    tokens = tokens.clamp(0, len(codebook) - 1)
    grad, following = grads
    needs_map, _, needs_codes, needs_weight, needs_bias = needs
    size = feature_map.shape[-2:]
    if grad is None:
        total = torch.zeros(feature_map.shape, dtype=torch.float32, device=feature_map.device)
    else:  # a copy: results of an operator may not be its arguments
        total = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if following is not None and following.shape[1]:
        image = following.to(torch.float32).mT.unflatten(2, (next_height, next_width))  # [B, C, h', w']
        total += _resampled(image, [m.T for m in _axes(size, (next_height, next_width), "area", total)])
    weight, bias, incoming = None, None, total  # [B, C, H, W], of what is upsampled
    upwards = _axes((height, width), size, "bicubic", total)
    if phi_weight is not None and (needs_codes or needs_weight or needs_bias):
        convolution = phi_weight.to(torch.float32)
        codes = total  # its values count for the gradient of the weight alone
        if needs_weight:
            gathered = F.embedding(tokens, codebook.to(torch.float32)).mT.unflatten(2, (height, width))
            codes = _resampled(gathered, upwards)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            blurred, weight, bias = torch.ops.aten.convolution_backward(
                total * phi_ratio, codes, convolution, [len(convolution)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                [needs_codes, needs_weight, needs_bias],
            )  # fmt: skip
        if needs_codes:
            incoming = blurred.add_(total, alpha=1 - phi_ratio)
    book = None
    if needs_codes:
        rows = _resampled(incoming, [m.T for m in upwards]).flatten(2).mT  # [B, n, C]
        book = torch.ops.aten.embedding_dense_backward(rows.contiguous(), tokens, len(codebook), -1, False)
    found = [
        (needs_map, total, feature_map),
        (needs_codes, book, codebook),
        (needs_weight, weight, phi_weight),
        (needs_bias, bias, phi_bias),
    ]
    return [g.to(t.dtype).contiguous() for need, g, t in found if need and g is not None and t is not None]


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
