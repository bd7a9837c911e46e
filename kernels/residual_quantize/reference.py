"""Multi-scale residual quantisation with a codebook in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastvar.ops.residual_quantize import AccumulateCall, QuantizeCall, ScaleConv

_DISTANCES = 1 << 22  # of the distance matrix in memory at a time


def forward(call: QuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, L), feature map (B, C, H, W), teacher-forcing inputs (B, L - n_1, C) and uses of the codes (V,)."""
    schedule, compute = call.schedule, torch.promote_types(call.features.dtype, torch.float32)
    residual, codebook = call.features.to(compute).contiguous(), call.codebook.to(compute)
    feature_map = torch.zeros_like(residual)
    tokens, inputs = [], [_to_rows(residual[:, :, :0])]
    for k, grid in enumerate(schedule):
        rows = _to_rows(_area(residual, grid))  # [B, n_k, C]
        nearest = _most_similar if call.znorm else _nearest
        tokens.append(nearest(rows.flatten(0, 1), codebook).view(rows.shape[:2]))
        phi = None if call.phi is None else call.phi.of(k)
        codes = _upsampled(tokens[k], codebook, grid, schedule.finest, phi)
        feature_map = feature_map + codes
        residual = residual - codes
        if k + 1 < len(schedule):
            inputs.append(_to_rows(_area(feature_map, schedule[k + 1])))
    all_tokens = torch.cat(tokens, 1)
    return all_tokens, feature_map, torch.cat(inputs, 1), _uses(all_tokens, len(codebook))


def accumulate_scale(call: AccumulateCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature map (B, C, H, W) with the tokens (B, n_k) of a scale, and the next input (B, n_{k+1}, C)."""
    feature_map, compute = call.feature_map, torch.promote_types(call.feature_map.dtype, torch.float32)
    grid, following = (call.height, call.width), (call.next_height, call.next_width)
    codes = _upsampled(call.tokens, call.codebook.to(compute), grid, feature_map.shape[-2:], call.phi)
    accumulated = (feature_map.to(compute) + codes).contiguous()
    return accumulated, _to_rows(_area(accumulated, following) if all(following) else accumulated[:, :, :0])


def _uses(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of `size` codes is among the tokens (B, L): (V,) int64. Unlike bincount it waits for nothing."""
    flat = tokens.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def _nearest(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the codebook's row (V, C) with the smallest squared distance to each of the rows (N, C)."""
    norms = codebook.square().sum(1)  # [V]
    parts = rows.split(max(1, _DISTANCES // len(codebook)))
    lengths = ((part, part.square().sum(1, keepdim=True) + norms) for part in parts)
    return torch.cat([torch.addmm(sums, part, codebook.T, alpha=-2).argmin(1) for part, sums in lengths])


def _most_similar(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the codebook's row (V, C) with the largest cosine to each of the rows (N, C)."""
    directions = F.normalize(codebook, dim=1)
    parts = F.normalize(rows, dim=1).split(max(1, _DISTANCES // len(codebook)))
    return torch.cat([(part @ directions.T).argmax(1) for part in parts])


def _upsampled(
    tokens: torch.Tensor, codebook: torch.Tensor, grid: Sequence[int], size: Sequence[int], phi: ScaleConv | None
) -> torch.Tensor:
    """What the tokens (B, n) of a grid add to the feature map of `size`: phi(bicubic(codes)), (B, C, H, W)."""
    codes = F.embedding(tokens, codebook).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)  # [B, C, h, w]
    if tuple(grid) != tuple(size):
        codes = F.interpolate(codes, size=tuple(size), mode="bicubic")
    codes = codes.contiguous()
    if phi is None:
        return codes
    # on CUDA this follows torch.backends.cudnn, whose default is TF32; upstream's convolution does so too
    blurred = F.conv2d(codes, phi.weight.to(codes.dtype), phi.bias.to(codes.dtype), padding=1)
    return codes * (1 - phi.ratio) + blurred * phi.ratio


def _area(image: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The means over bins floor(i H / h) to ceil((i + 1) H / h), which overlap where h does not divide H."""
    return image if image.shape[-2:] == tuple(grid) else F.interpolate(image, size=tuple(grid), mode="area")


def _to_rows(image: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w, C), contiguous and never a view."""
    return image.flatten(2).mT.clone(memory_format=torch.contiguous_format)
