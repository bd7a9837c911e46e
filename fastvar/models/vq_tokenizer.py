"""The multi-scale VQ tokenizer of VAR: encoder, residual quantiser over scales, decoder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.autoencoder import Decoder, Encoder, check_images, to_channels_last
from fastvar.models.pretrained import PretrainedModel
from fastvar.ops import QuantizedResidual, ResidualConv, accumulate_scale, residual_conv_index, residual_quantize
from fastvar.ranges import Count, NotNegative, Positive, Range, Share, ShareBelowOne, check_fields
from fastvar.schedule import VAR_256, ScaleSchedule


@dataclass(frozen=True)
class VQTokenizerConfig:
    """Shape of a `VQTokenizer`; the defaults are those of the public VAR tokenizer (109 M parameters)."""

    grids: tuple[tuple[int, int], ...] = VAR_256.grids
    """Token grids (height, width), coarse to fine; the last one is the feature map's size."""
    vocab_size: Count = 4096
    """V, entries of the codebook."""
    code_channels: Count = 32
    """C, channels of a code and of the feature map."""
    channels: Count = 160
    """Width of the first convolution."""
    channel_multipliers: Annotated[tuple[int, ...], Range(1)] = (1, 1, 2, 2, 4)
    """Width of each resolution in units of `channels`; the image is 2^(len - 1) times the finest grid."""
    blocks_per_level: Count = 2
    norm_groups: Count = 32
    attention: bool = True
    """Attention on the coarsest resolution of encoder and decoder."""
    dropout: ShareBelowOne = 0.0
    residual_convs: Count = 4
    """How many convolutions phi the scales share: 1, one for all; K, one each; of more than K some are unused."""
    residual_ratio: Share = 0.5
    """r in phi(h) = (1 - r) h + r conv(h); 0 for no phi."""
    cosine: bool = False
    """Nearest code by cosine instead of Euclidean distance."""
    commitment_weight: NotNegative = 0.25
    """Of the encoder's loss against the codebook's."""
    chroma_gain: Positive = 1.0
    """Networks and reconstruction loss see colour, the deviation from grey, enlarged by this factor. Where brightness
    varies much more than colour, a tokenizer trained for minutes learns no colour without it; 1 for public weights."""

    def __post_init__(self) -> None:
        # lists, as they come from JSON
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        check_fields(self)
        if not self.channel_multipliers:
            raise ValueError("VQTokenizerConfig: channel_multipliers: expected at least one, got none")
        widths = [self.channels * m for m in (1, *self.channel_multipliers)]
        if any(width % self.norm_groups for width in widths):
            raise ValueError(
                f"VQTokenizerConfig: norm_groups: expected a divisor of all widths {sorted(set(widths))}, "
                f"got {self.norm_groups}"
            )

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def downsampling(self) -> int:
        """Pixels per side of a cell of the finest grid."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images in pixels."""
        return self.image_size_of(self.schedule)

    def image_size_of(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """(H, W) in pixels of the images of another schedule."""
        height, width = schedule.finest
        return height * self.downsampling, width * self.downsampling


class TokenizerOutput(NamedTuple):
    """What `VQTokenizer.forward` answers in training.

    Attributes:
        reconstruction: (B, 3, H, W), not clamped.
        quantization_loss: scalar, commitment and codebook loss, mean over scales.
        tokens: (B, L) int64.
        usage: (V,) int64, how often each code is among the tokens.
    """

    reconstruction: torch.Tensor
    quantization_loss: torch.Tensor
    tokens: torch.Tensor
    usage: torch.Tensor


class VQTokenizer(PretrainedModel):
    """Images (B, 3, H, W) in [-1, 1] to tokens (B, L) and back."""

    config_class = VQTokenizerConfig

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        shape: dict[str, Any] = {
            "blocks_per_level": config.blocks_per_level,
            "norm_groups": config.norm_groups,
            "dropout": config.dropout,
            "attention": config.attention,
        }
        width = config.code_channels
        self.encoder = Encoder(config.channels, config.channel_multipliers, width, **shape)
        self.decoder = Decoder(config.channels, config.channel_multipliers, width, **shape)
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.codebook = nn.Parameter(torch.empty(config.vocab_size, width))
        nn.init.normal_(self.codebook, std=width**-0.5)
        self._phi_index: tuple[int, ...] = ()
        self.phi_weight: nn.Parameter | None = None
        self.phi_bias: nn.Parameter | None = None
        if config.residual_ratio > 0:
            self._phi_index = residual_conv_index(len(self.schedule), config.residual_convs)
            convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(config.residual_convs)]
            self.phi_weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
            self.phi_bias = nn.Parameter(torch.zeros(config.residual_convs, width))
        to_channels_last(self)

    @property
    def phi(self) -> ResidualConv | None:
        """The convolutions after upsampling, as the operators take them."""
        if self.phi_weight is None or self.phi_bias is None:
            return None
        return ResidualConv(self.phi_weight, self.phi_bias, self.config.residual_ratio, self._phi_index)

    def enlarge_chroma(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) as the networks see them: the deviation from grey times the config's gain."""
        return _scaled_chroma(images, self.config.chroma_gain)

    def encode_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to continuous features (B, C, h, w), float32 at least."""
        check_images("VQTokenizer", images, self.config.image_size)
        features = self.quant_conv(self.encoder(self.enlarge_chroma(images).to(self.quant_conv.weight.dtype)))
        return features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()

    @torch.no_grad()
    def quantize(self, images: torch.Tensor) -> QuantizedResidual:
        """Images (B, 3, H, W) to tokens, feature map and the inputs of teacher forcing in one go.

        Autocast is off inside: which code is nearest must not depend on whether a model is in training.
        """
        check_images("VQTokenizer", images, self.config.image_size)
        with torch.autocast(images.device.type, enabled=False):
            return self._quantize(self.encode_features(images))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to tokens (B, L) int64."""
        return self.quantize(images).tokens

    def _quantize(self, features: torch.Tensor) -> QuantizedResidual:
        return residual_quantize(features, self.codebook, self.schedule, phi=self.phi, znorm=self.config.cosine)

    def accumulate(
        self, tokens: torch.Tensor, feature_map: torch.Tensor, scale: int, *, schedule: ScaleSchedule | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the tokens (B, n_k) of a scale to the feature map (B, C, h, w); the second result is the next scale's
        input (B, n_{k+1}, C), None after the last one."""
        return accumulate_scale(tokens, feature_map, self.codebook, schedule or self.schedule, scale, phi=self.phi)

    def empty_feature_map(self, batch: int, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """The feature map (B, C, h, w) before the first scale."""
        dtype = torch.promote_types(self.codebook.dtype, torch.float32)
        size = (schedule or self.schedule).finest
        return torch.zeros(batch, self.config.code_channels, *size, dtype=dtype, device=self.codebook.device)

    def sampled_with(self) -> tuple[list[nn.Module], list[torch.Tensor]]:
        """The modules that sampling and decoding run, and weights that it reads besides."""
        own = (self.codebook, self.phi_weight, self.phi_bias)
        return [self.post_quant_conv, self.decoder], [weight for weight in own if weight is not None]

    def _accumulate(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Feature maps (B, C, h, w) after each scale, and the next scales' inputs (B, n_k, C)."""
        schedule = self.schedule.with_num_tokens(tokens.shape[1])
        feature_map, maps, inputs = self.empty_feature_map(len(tokens)), [], []
        for k, of_scale in enumerate(tokens.split(schedule.lengths, 1)):
            feature_map, following = self.accumulate(of_scale, feature_map, k)
            maps.append(feature_map)
            if following is not None:
                inputs.append(following)
        return maps, inputs

    @torch.no_grad()
    def teacher_forcing(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) to a transformer's inputs (B, L - n_1, C): for each scale after the first one, the feature
        map of the scales before it, resampled to its grid. Tokens of the first m scales give the inputs up to m."""
        _, inputs = self._accumulate(tokens)
        count = self.schedule.with_num_tokens(tokens.shape[1]).num_tokens - self.schedule.lengths[0]
        empty = self.codebook.new_zeros(tokens.shape[0], 0, self.config.code_channels)
        return torch.cat([empty, *inputs], 1)[:, :count]

    @torch.no_grad()
    def feature_map(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L), or those of the first m scales, to the accumulated feature map (B, C, h, w)."""
        return self._accumulate(tokens)[0][-1]

    @torch.no_grad()
    def pyramid(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) to the prefix of a reference subject (B, L, C): the complete feature map, area-resampled to
        every grid of the schedule."""
        feature_map = self.feature_map(tokens)
        return torch.cat(
            [F.interpolate(feature_map, grid, mode="area").flatten(2).mT for grid in self.schedule], 1
        ).contiguous()

    def decode_features(self, feature_map: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Feature map (B, C, h, w) to images (B, 3, H, W), not clamped.

        Args:
            feature_map: of all scales, or of the first ones.
            dtype: bfloat16 or float16 to compute in it (by autocast: the weights stay as they are); None for the
                weights' own.
        """
        low = dtype is not None and dtype.itemsize < self.post_quant_conv.weight.dtype.itemsize
        with torch.autocast(feature_map.device.type, dtype) if low else nullcontext():
            enlarged = self.decoder(self.post_quant_conv(feature_map.to(self.post_quant_conv.weight.dtype)))
        return _scaled_chroma(enlarged, 1 / self.config.chroma_gain).contiguous()

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tokens (B, L), or those of the first m scales, to images (B, 3, H, W) in [-1, 1]; dtype: see
        `decode_features`."""
        return self.decode_features(self.feature_map(tokens), dtype=dtype).clamp(-1, 1)

    def forward(self, images: torch.Tensor) -> TokenizerOutput:
        """The training pass: straight-through gradient to the encoder, commitment and codebook loss per scale.

        The loss is the mean over scales of weight * mse(stop(map_k), features) + mse(map_k, stop(features)), where
        map_k is the feature map after scale k (VAR, arXiv 2404.02905, section 3.2).

        Args:
            images: (B, 3, H, W) in [-1, 1].
        """
        features = self.encode_features(images)
        frozen = features.detach()
        quantized = self._quantize(frozen)
        maps, _ = self._accumulate(quantized.tokens)
        weight = self.config.commitment_weight
        losses = [weight * F.mse_loss(m.detach(), features) + F.mse_loss(m, frozen) for m in maps]
        straight_through = features + (maps[-1] - features).detach()
        reconstruction = self.decode_features(straight_through)
        return TokenizerOutput(reconstruction, torch.stack(losses).mean(), quantized.tokens, quantized.usage)


def _scaled_chroma(images: torch.Tensor, factor: float) -> torch.Tensor:
    if factor == 1:
        return images
    grey = images.mean(1, keepdim=True)
    return grey + factor * (images - grey)
