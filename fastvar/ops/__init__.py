"""The operators: one public function each, with `backend="auto"`, or one of those that `fastvar.support()` names."""

from fastvar.ops._dispatch import check_preference, explain, support
from fastvar.ops.adaptive_layer_norm import adaptive_layer_norm, gated_residual, gated_residual_norm
from fastvar.ops.bitwise_residual_quantize import QuantizedBits, accumulate_bits, bitwise_residual_quantize
from fastvar.ops.block_causal_attention import PrefixKV, block_causal_attention, block_causal_attention_with_lse
from fastvar.ops.cached_attention import cached_attention
from fastvar.ops.cross_entropy import CrossEntropy, cross_entropy
from fastvar.ops.group_norm_silu import group_norm_silu
from fastvar.ops.policy_loss import PolicyLoss, PolicyLossOptions, group_advantages, policy_loss
from fastvar.ops.propagate_mask import boxes_to_mask, propagate_mask
from fastvar.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_into_cache, rope_tables
from fastvar.ops.residual_quantize import (
    AccumulatedScale,
    QuantizedResidual,
    ResidualConv,
    accumulate_scale,
    residual_conv_index,
    residual_quantize,
)
from fastvar.ops.sample_tokens import SampledBits, SampledTokens, sample_bits, sample_tokens
from fastvar.ops.token_log_probs import TokenLogProbs, token_log_probs

check_preference()

__all__ = [
    "AccumulatedScale",
    "CrossEntropy",
    "PolicyLoss",
    "PolicyLossOptions",
    "PrefixKV",
    "QuantizedBits",
    "QuantizedResidual",
    "ResidualConv",
    "SampledBits",
    "SampledTokens",
    "TokenLogProbs",
    "accumulate_bits",
    "accumulate_scale",
    "adaptive_layer_norm",
    "bitwise_residual_quantize",
    "block_causal_attention",
    "block_causal_attention_with_lse",
    "boxes_to_mask",
    "cached_attention",
    "cross_entropy",
    "explain",
    "gated_residual",
    "gated_residual_norm",
    "group_advantages",
    "group_norm_silu",
    "policy_loss",
    "propagate_mask",
    "qk_norm_rope",
    "qk_norm_rope_into_cache",
    "residual_conv_index",
    "residual_quantize",
    "rope_tables",
    "sample_bits",
    "sample_tokens",
    "support",
    "token_log_probs",
]
