"""Multi-scale residual quantisation with a codebook in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastvar.schedule import ScaleSchedule

# Elements of the distance matrix that are in memory at a time.
_DISTANCES = 1 << 22


def forward(
    features: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    phi_index: Sequence[int],
    schedule: ScaleSchedule,
    znorm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, L), feature map (B, C, H, W), teacher-forcing inputs (B, L - n_1, C) and uses of the codes (V,) of
    features (B, C, H, W)."""
    compute = torch.promote_types(features.dtype, torch.float32)
    residual = features.to(compute).contiguous()
    codebook = codebook.to(compute)  # [V, C]
    feature_map = torch.zeros_like(residual)
    tokens, inputs = [], []
    for k, grid in enumerate(schedule):
        rows = _to_rows(_area(residual, grid))  # [B, n_k, C]
        nearest = _most_similar if znorm else _nearest
        tokens.append(nearest(rows.flatten(0, 1), codebook).view(rows.shape[:2]))
        weight, bias = None, None
        if phi_weight is not None and phi_bias is not None:
            weight, bias = phi_weight[phi_index[k]], phi_bias[phi_index[k]]
        codes = _upsampled(tokens[k], codebook, grid, schedule.finest, weight, bias, phi_ratio)
        feature_map = feature_map + codes
        residual = residual - codes
        if k + 1 < len(schedule):
            inputs.append(_to_rows(_area(feature_map, schedule[k + 1])))
    empty = residual.new_zeros(residual.shape[0], 0, residual.shape[1])
    found = torch.cat(tokens, 1)
    return found, feature_map, torch.cat([empty, *inputs], 1), _uses(found, len(codebook))


def accumulate_scale(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature map (B, C, H, W) with the tokens (B, n_k) of a scale, and the next input (B, n_{k+1}, C).

    One phi: weight (C, C, 3, 3), bias (C,). A next grid of 0 x 0 stands for none: its input has no tokens.
    """
    compute = torch.promote_types(feature_map.dtype, torch.float32)
    size = feature_map.shape[-2:]
    codes = _upsampled(tokens, codebook.to(compute), (height, width), size, phi_weight, phi_bias, phi_ratio)
    accumulated = (feature_map.to(compute) + codes).contiguous()
    if next_height * next_width == 0:
        return accumulated, accumulated.new_zeros(accumulated.shape[0], 0, accumulated.shape[1])
    return accumulated, _to_rows(_area(accumulated, (next_height, next_width)))


def _uses(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of `size` codes is among the tokens (B, L): (V,) int64. Unlike bincount it waits for nothing."""
    flat = tokens.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def _nearest(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the codebook's row (V, C) with the smallest squared distance to each of the rows (N, C)."""
    norms = codebook.square().sum(1)  # [V]
    found = []
    for part in rows.split(max(1, _DISTANCES // len(codebook))):
        distances = part.square().sum(1, keepdim=True) + norms
        found.append(torch.addmm(distances, part, codebook.T, alpha=-2).argmin(1))
    return torch.cat(found)


def _most_similar(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the codebook's row (V, C) with the largest cosine to each of the rows (N, C)."""
    directions = F.normalize(codebook, dim=1)
    parts = F.normalize(rows, dim=1).split(max(1, _DISTANCES // len(codebook)))
    return torch.cat([(part @ directions.T).argmax(1) for part in parts])


def _upsampled(
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
) -> torch.Tensor:
    """What the tokens (B, n) of a grid add to the feature map of `size`: phi(bicubic(codes)), (B, C, H, W)."""
    codes = F.embedding(tokens, codebook).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)  # [B, C, h, w]
    if tuple(grid) != tuple(size):
        codes = F.interpolate(codes, size=tuple(size), mode="bicubic")
    codes = codes.contiguous()
    if phi_weight is None or phi_bias is None:
        return codes
    # on CUDA this follows torch.backends.cudnn, whose default is TF32; upstream's convolution does so too
    blurred = F.conv2d(codes, phi_weight.to(codes.dtype), phi_bias.to(codes.dtype), padding=1)
    return codes * (1 - phi_ratio) + blurred * phi_ratio


def _area(image: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The means over bins floor(i H / h) to ceil((i + 1) H / h), which overlap where h does not divide H."""
    return image if image.shape[-2:] == tuple(grid) else F.interpolate(image, size=tuple(grid), mode="area")


def _to_rows(image: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h w, C), contiguous and never a view."""
    return image.flatten(2).mT.clone(memory_format=torch.contiguous_format)
