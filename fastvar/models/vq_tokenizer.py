"""The multi-scale VQ tokenizer of VAR: encoder, residual quantiser over scales, decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.autoencoder import check_images, to_channels_last
from fastvar.models.scale_tokenizer import ScaleTokenizer, ScaleTokenizerConfig, TokenizerOutput
from fastvar.ops import QuantizedResidual, ResidualConv, accumulate_scale, residual_conv_index, residual_quantize
from fastvar.ranges import Count, NotNegative, Positive, Range, Share, ShareBelowOne
from fastvar.schedule import VAR_256, ScaleSchedule


@dataclass(frozen=True)
class VQTokenizerConfig(ScaleTokenizerConfig):
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
    """Weight of the encoder's loss against the codebook's."""
    chroma_gain: Positive = 1.0
    """Networks and reconstruction loss see colour, the deviation from grey, enlarged by this factor. Where brightness
    varies much more than colour, a tokenizer trained for minutes learns no colour without it; 1 for public weights."""


class VQTokenizer(ScaleTokenizer):
    """Images (B, 3, H, W) in [-1, 1] to tokens (B, L) int64 and back, over any schedule, see `ScaleTokenizer`."""

    config_class = VQTokenizerConfig

    def __init__(self, config: VQTokenizerConfig) -> None:
        width = config.code_channels
        super().__init__(config, width, attention=config.attention)
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.codebook = nn.Parameter(torch.empty(config.vocab_size, width))
        nn.init.normal_(self.codebook, std=width**-0.5)
        self.phi_weight: nn.Parameter | None = None
        self.phi_bias: nn.Parameter | None = None
        if config.residual_ratio > 0:
            convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(config.residual_convs)]
            self.phi_weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
            self.phi_bias = nn.Parameter(torch.zeros(config.residual_convs, width))
        to_channels_last(self)

    @property
    def phi(self) -> ResidualConv | None:
        """The convolutions after upsampling, as the operators take them."""
        return self._phi(self.schedule)

    def _phi(self, schedule: ScaleSchedule) -> ResidualConv | None:
        if self.phi_weight is None or self.phi_bias is None:
            return None
        index = residual_conv_index(len(schedule), self.config.residual_convs)
        return ResidualConv(self.phi_weight, self.phi_bias, self.config.residual_ratio, index)

    def enlarge_chroma(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) as the networks see them: the deviation from grey times the config's gain."""
        return _scaled_chroma(images, self.config.chroma_gain)

    def encode_features(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to continuous features (B, C, h, w), float32 at least."""
        check_images("VQTokenizer", images, self.config.image_size_of(schedule or self.schedule))
        features = self.quant_conv(self.encoder(self.enlarge_chroma(images).to(self.quant_conv.weight.dtype)))
        return features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()

    @torch.no_grad()
    def quantize(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> QuantizedResidual:
        """Images (B, 3, H, W) to tokens, feature map and the inputs of teacher forcing in one go.

        Autocast is off inside: which code is nearest must not depend on whether a model is in training.
        """
        check_images("VQTokenizer", images, self.config.image_size_of(schedule or self.schedule))
        with torch.autocast(images.device.type, enabled=False):
            return self._quantize(self.encode_features(images, schedule=schedule), schedule or self.schedule)

    def _quantize(self, features: torch.Tensor, schedule: ScaleSchedule) -> QuantizedResidual:
        return residual_quantize(features, self.codebook, schedule, phi=self._phi(schedule), znorm=self.config.cosine)

    def codes(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.codebook.detach())

    def accumulate(
        self, tokens: torch.Tensor, feature_map: torch.Tensor, scale: int, *, schedule: ScaleSchedule | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        schedule = schedule or self.schedule
        return accumulate_scale(tokens, feature_map, self.codebook, schedule, scale, phi=self._phi(schedule))

    def sampled_with(self) -> tuple[list[nn.Module], list[torch.Tensor]]:
        own = (self.codebook, self.phi_weight, self.phi_bias)
        return [self.post_quant_conv, self.decoder], [weight for weight in own if weight is not None]

    def _features_to_images(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(feature_map))

    def decode_features(self, feature_map: torch.Tensor, **options: Any) -> torch.Tensor:
        return _scaled_chroma(super().decode_features(feature_map, **options), 1 / self.config.chroma_gain)

    def forward(self, images: torch.Tensor, *, schedule: ScaleSchedule | None = None) -> TokenizerOutput:
        """The training pass: straight-through gradient to the encoder, commitment and codebook loss per scale.

        The loss is the mean over scales of weight * mse(stop(map_k), features) + mse(map_k, stop(features)), where
        map_k is the feature map after scale k (VAR, arXiv 2404.02905, section 3.2).

        Args:
            images: (B, 3, H, W) in [-1, 1].
            schedule: the grids; the config's by default.
        """
        features = self.encode_features(images, schedule=schedule)
        frozen = features.detach()
        quantized = self._quantize(frozen, schedule or self.schedule)
        maps = [feature_map for feature_map, _ in self._accumulated(quantized.tokens, schedule)]
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
