"""Convolutional encoder and decoder of VQ tokenizers (the architecture of VQGAN and latent diffusion).

Submodules are named as in public checkpoints, so that those load without renaming. Images and weights lie channels-last
in memory, where convolutions are faster on GPUs and on CPUs, and where a position's channels are a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _module

from fastvar.ops import group_norm_silu


def _rows(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H W, C)."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, H W, C) to (B, C, H, W)."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def normalised(
    norm: nn.GroupNorm, x: torch.Tensor, *, silu: bool = True, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """SiLU(norm(x + shift)) of images (B, C, H, W)."""
    rows = group_norm_silu(
        _rows(x), norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps, silu=silu, shift=shift
    )
    return _images(rows, x)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution may be computed from its weights: nobody has put hooks or other padding on it."""
    hooks = conv._forward_hooks or conv._forward_pre_hooks
    hooks = hooks or _module._global_forward_hooks or _module._global_forward_pre_hooks
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not hooks


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, shift = normalised(self.norm1, x), None
        if x.device.type == "cuda" and not torch.is_grad_enabled() and _is_plain(self.conv1):
            # cuDNN would add the bias in a pass over memory of its own
            h, shift = F.conv2d(h, self.conv1.weight, padding=1), self.conv1.bias
        else:
            h = self.conv1(h)
        h = self.conv2(self.dropout(normalised(self.norm2, h, shift=shift)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map (B, C, H, W)."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(normalised(self.norm, x, silu=False))
        q, k, v = _rows(qkv).chunk(3, -1)  # [B, H W, C]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(_images(h, x))


class _Resample(nn.Module):
    """Halve (stride 2, padded right and below) or double (nearest) the resolution with a 3x3 convolution."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int, *, norm_groups: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm_groups=norm_groups, dropout=dropout)
        self.attn_1 = SpatialAttention(channels, norm_groups=norm_groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, norm_groups=norm_groups, dropout=dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention on the coarsest one, then the resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        norm_groups: int,
        dropout: float,
        attention: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(
            ResidualBlock(a, b, norm_groups=norm_groups, dropout=dropout) for a, b in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(out_channels, norm_groups=norm_groups) for _ in range(num_blocks if attention else 0)
        )
        if resample == "down":
            self.downsample = _Resample(out_channels, down=True)
        elif resample == "up":
            self.upsample = _Resample(out_channels, down=False)
        self.resample = resample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, z_channels, H / 2^(levels - 1), W / 2^(levels - 1))."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        z_channels: int,
        *,
        blocks_per_level: int = 2,
        norm_groups: int = 32,
        dropout: float = 0.0,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in (1, *multipliers)]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                widths[i],
                widths[i + 1],
                blocks_per_level,
                norm_groups=norm_groups,
                dropout=dropout,
                attention=attention and i == last,
                resample="down" if i < last else None,
            )
            for i in range(len(multipliers))
        )
        self.mid = _Middle(widths[-1], norm_groups=norm_groups, dropout=dropout, attention=attention)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            h = level(h)
        return self.conv_out(normalised(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to images (B, 3, h 2^(levels - 1), w 2^(levels - 1)); arguments as `Encoder`."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        z_channels: int,
        *,
        blocks_per_level: int = 2,
        norm_groups: int = 32,
        dropout: float = 0.0,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        widths.append(widths[-1])  # level i goes from widths[i + 1] to widths[i]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], norm_groups=norm_groups, dropout=dropout, attention=attention)
        self.up = nn.ModuleList(  # run from the last to the first
            _Level(
                widths[i + 1],
                widths[i],
                blocks_per_level + 1,
                norm_groups=norm_groups,
                dropout=dropout,
                attention=attention and i == last,
                resample="up" if i > 0 else None,
            )
            for i in range(len(multipliers))
        )
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(normalised(self.norm_out, h))
