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

# cuDNN has fast kernels for channels-last images of a multiple of so many output channels, and for as many at least.
CHANNEL_MULTIPLE, LEAST_CHANNELS = 8, 32


def check_images(owner: str, images: torch.Tensor, size: tuple[int, int]) -> None:
    """Raise a ValueError unless images are floating-point numbers (B, 3, H, W) of that size."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{owner}: images: expected floating-point numbers in [-1, 1], got {got}")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
        raise ValueError(f"{owner}: images: expected (B, 3, {size[0]}, {size[1]}), got {tuple(images.shape)}")


def to_channels_last(model: nn.Module) -> None:
    """Lay the weights of all convolutions channels-last in memory."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))


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


def _is_unhooked(module: nn.Module) -> bool:
    """Whether nobody listens to a module's calls or has put something in their place, so that another method may be
    called instead."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = (
        *(_module._global_forward_hooks, _module._global_forward_pre_hooks),
        *(_module._global_backward_hooks, _module._global_backward_pre_hooks),
    )
    return not (any(own) or any(of_all) or "forward" in vars(module) or module._compiled_call_impl is not None)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution may be computed from its weights: nobody has put hooks or other padding on it."""
    usual = conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)
    return type(conv) is nn.Conv2d and usual and _is_unhooked(conv)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def _may_carry(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a convolution's bias may be left to what comes after it, as on a GPU cuDNN adds it in a pass over memory
    of its own. Where gradients are wanted everything runs as written."""
    return _on_gpu(x) and not torch.is_grad_enabled() and _is_plain(conv)


def _convolved(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution of images, and what is still to be added to each channel (C,)."""
    carry, missing = _may_carry(conv, x), -conv.out_channels % CHANNEL_MULTIPLE
    if missing:
        missing = max(missing, LEAST_CHANNELS - conv.out_channels)
    if not carry and not (missing and _on_gpu(x) and _is_plain(conv)):
        return conv(x), None
    weight, bias = conv.weight, None if carry else conv.bias
    if missing:  # made anew in each call: it is small, and a copy that is kept would have to follow the weight
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        bias = None if bias is None else F.pad(bias, (0, missing))
    out = F.conv2d(x, weight, bias, conv.stride, conv.padding)
    return out[:, : conv.out_channels] if missing else out, conv.bias if carry else None


def _shifted(x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Images (B, C, H, W) plus a shift (C,)."""
    return x if shift is None else x + shift.to(x.dtype)[:, None, None]


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


class _Stage(nn.Module):
    """Images to images. Between stages they are x + shift, with the biases of convolutions in the shift (C,) until an
    operator takes it along: a norm takes it for nothing, an addition of its own would be a pass over memory."""

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _shifted(*self.carry(x, None))


def _through(stage: nn.Module, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A stage's result; one with hooks, or somebody's own, is called with the sum, and all are where gradients are
    wanted, as nothing is carried there."""
    may = not torch.is_grad_enabled() and _is_unhooked(stage)
    if may and isinstance(stage, _Stage) and type(stage).forward is _Stage.forward:
        return stage.carry(x, shift)
    return stage(_shifted(x, shift)), None


class ResidualBlock(_Stage):
    """Two normalised 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        h, bias = _convolved(self.conv1, normalised(self.norm1, x, shift=shift))
        h, bias = _convolved(self.conv2, self.dropout(normalised(self.norm2, h, shift=bias)))
        x, shift = self._shortcut(x, shift)
        return x + h, _both(shift, bias)

    def _shortcut(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        conv = self.nin_shortcut
        if not isinstance(conv, nn.Conv2d) or not _may_carry(conv, x):
            return (x, shift) if type(conv) is nn.Identity and _is_unhooked(conv) else (conv(_shifted(x, shift)), None)
        x, bias = _convolved(conv, x)
        if shift is not None:  # a sum, not a product of matrices: autocast leaves it in the weights' dtype
            shift = (conv.weight.flatten(1) * shift).sum(1)
        return x, _both(shift, bias)


class SpatialAttention(_Stage):
    """Single-head attention over all positions of a feature map (B, C, H, W)."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(normalised(self.norm, x, silu=False, shift=shift))
        q, k, v = _rows(qkv).chunk(3, -1)  # [B, H W, C]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out, bias = _convolved(self.proj_out, _images(h, x))
        return x + out, _both(shift, bias)


class _Resample(_Stage):
    """Halve (stride 2, padded right and below) or double (nearest) the resolution with a 3x3 convolution."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        even = not self.down or (x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0)
        if even and _may_carry(self.conv, x):
            return (self._halved(x, shift), None) if self.down else _convolved(self.conv, _doubled(x, shift))
        x = _shifted(x, shift)
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x), None

    def _halved(self, x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Without a padded copy: padding of 2 on all sides adds a row and a column of results, which are left out."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        weight, bias = self.conv.weight, self.conv.bias
        out = F.conv2d(x, weight, stride=2, padding=2)[:, :, 1 : 1 + height, 1 : 1 + width]
        if shift is None:
            return _shifted(out, bias)
        # What the shift comes to is one number a channel, but in the last row and column, where padding has no shift
        edges = F.conv2d(F.pad(shift[None, :, None, None].expand(-1, -1, 4, 4), (0, 1, 0, 1)), weight, bias, stride=2)
        return out + F.pad(edges, (width - 2, 0, height - 2, 0), mode="replicate").to(out.dtype)


def _doubled(x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Images of twice the size, nearest, plus a shift: a copy of rows of channels, 16 bytes at a time where they can be
    taken so. PyTorch's own operator takes four times as long."""
    batch, channels, height, width = x.shape
    flat, wide = _shifted(x, shift).permute(0, 2, 3, 1).reshape(-1), torch.complex128
    if channels * x.element_size() % wide.itemsize == 0:
        flat = flat.view(wide)
    wide_channels = channels * x.element_size() // flat.element_size()
    rows = flat.view(batch, height, 1, width, 1, wide_channels).expand(-1, -1, 2, -1, 2, -1)
    return rows.contiguous().view(x.dtype).view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class _Middle(_Stage):
    def __init__(self, channels: int, *, norm_groups: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm_groups=norm_groups, dropout=dropout)
        self.attn_1 = SpatialAttention(channels, norm_groups=norm_groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, norm_groups=norm_groups, dropout=dropout)

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, shift = _through(self.block_1, x, shift)
        if type(self.attn_1) is not nn.Identity:
            x, shift = _through(self.attn_1, x, shift)
        return _through(self.block_2, x, shift)


class _Level(_Stage):
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

    def carry(self, x: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        for i, block in enumerate(self.block):
            x, shift = _through(block, x, shift)
            if len(self.attn):
                x, shift = _through(self.attn[i], x, shift)
        if self.resample == "down":
            return _through(self.downsample, x, shift)
        return _through(self.upsample, x, shift) if self.resample == "up" else (x, shift)


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
        h, shift = _convolved(self.conv_in, x.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            h, shift = _through(level, h, shift)
        h, shift = _through(self.mid, h, shift)
        return _shifted(*_convolved(self.conv_out, normalised(self.norm_out, h, shift=shift)))


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
        h, shift = _convolved(self.conv_in, z.contiguous(memory_format=torch.channels_last))
        h, shift = _through(self.mid, h, shift)
        for level in reversed(self.up):
            h, shift = _through(level, h, shift)
        return _shifted(*_convolved(self.conv_out, normalised(self.norm_out, h, shift=shift)))
