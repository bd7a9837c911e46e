"""The public VAR (FoundationVision/VAR) and forks of it that kept the names of its attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.integrations.patching import Own, Patch, own
from fastvar.ops import (
    ResidualConv,
    accumulate_scale,
    adaptive_layer_norm,
    block_causal_attention,
    cached_attention,
    gated_residual,
    gated_residual_norm,
    qk_norm_rope,
    qk_norm_rope_into_cache,
    residual_quantize,
)
from fastvar.schedule import ScaleSchedule

Tables = tuple[torch.Tensor, torch.Tensor]


# -- attention ---------------------------------------------------------------------------------------------------------


def queries_keys_values(attention: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, L, H, D) each, of an attention with one projection and biases of queries and values."""
    biases = attention.q_bias, attention.zero_k_bias, attention.v_bias
    bias = own(attention).run.once((attention, "bias"), lambda: torch.cat(biases), biases[0])
    projection = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.mat_qkv
    q, k, v = F.linear(x, projection.weight, bias).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    return q, k, v


def log_scale(attention: Any) -> torch.Tensor | None:
    """(H,), if queries and keys are normalised."""
    scale = getattr(attention, "scale_mul_1H11", None)
    return None if scale is None else scale.flatten()


def filled(attention: Any) -> int:
    """How many tokens the cache of an attention holds."""
    return 0 if attention.cached_k is None else attention.cached_k.shape[1]


def samples(attention: Any, plain: bool) -> bool:
    """Whether new tokens are for `attend_to_cache`: while caching, without gradients, in plain steps. An image that the
    former method has begun is its own to the end.

    Args:
        plain: whether the step has no mask and all that it needs.

    Raises:
        RuntimeError: a step that is not, where the cache is in our layout, which the former method does not read.
    """
    if not attention.caching:
        return False
    begun, known = attention.cached_k is not None, own(attention)
    plain = plain and not torch.is_grad_enabled()
    if not begun:
        known.caches = plain
    elif known.caches and not plain:
        raise RuntimeError(
            "integrations: attention: expected all steps of an image without mask and gradients, got one with some "
            "after others without; call kv_caching, or apply parts without attention"
        )
    return known.caches


def attend_to_cache(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    capacity: int,
    scale: torch.Tensor | None = None,
    rope: Tables | None = None,
) -> torch.Tensor:
    """New tokens (B, n, H, D) into a cache with room for `capacity`, and their attention to all that is in it; they are
    normalised if there is a scale of the heads, and rotated. For those who look, `cached_k` and `cached_v` are what is
    filled of it, (B, S, H, D)."""
    run, position = own(attention).run, filled(attention)
    end = position + q.shape[1]
    seen, keys, values = run.caches.get(attention, (None, q, q))
    if seen is None or seen is not attention.cached_k or end > keys.shape[1]:
        # in memory a head's rows lie together, which is how attention reads them
        size = (len(q), q.shape[2], max(capacity, end), q.shape[3])
        keys, values = (torch.empty(size, dtype=q.dtype, device=q.device).transpose(1, 2) for _ in range(2))
        if position:
            keys[:, :position], values[:, :position] = attention.cached_k, attention.cached_v
    q = qk_norm_rope_into_cache(q, k, v, keys, values, position, log_scale=scale, rope=rope)
    attention.cached_k, attention.cached_v = keys[:, :end], values[:, :end]
    run.caches[attention] = attention.cached_k, keys, values
    return cached_attention(q, attention.cached_k, attention.cached_v, softmax_scale=attention.scale)


def attend_to_scales(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    rope: Tables | None = None,
    block_diagonal: bool = False,
) -> torch.Tensor:
    """Teacher forcing: all scales at once, (B, L, H, D) each."""
    scale = log_scale(attention)
    if scale is not None or rope is not None:
        q, k = qk_norm_rope(q, k, log_scale=scale, rope=rope)
    return block_causal_attention(q, k, v, schedule, softmax_scale=attention.scale, block_diagonal=block_diagonal)


def masked(known: Own, mask: torch.Tensor | None, schedule: ScaleSchedule | None, tokens: int) -> bool | None:
    """Whether a dense mask over that many tokens shows the scales of a schedule themselves alone; None for a mask that
    does not stand for the schedule."""
    if schedule is None or mask is None or tuple(mask.shape) != (1, 1, tokens, tokens):
        return None
    return known.run.block_diagonal(mask, schedule.lengths)


PARTS_OF_ATTENTION = ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "scale_mul_1H11", "proj", "proj_drop")
PARTS_OF_BLOCK = ("attn", "ffn", "ln_wo_grad", "drop_path", "ada_lin", "ada_gss")


def further_parts(module: Any, *public: str) -> str | None:
    """Which parameters, buffers and submodules a module has that the public one has not, in a sentence."""
    members = [*module._parameters, *module._buffers, *module._modules]
    others = [name for name in members if name not in public]
    return f"it has parts that the public one has not: {', '.join(others)}" if others else None


def attention_obstacle(attention: Any, parts: Sequence[str] = PARTS_OF_ATTENTION) -> str | None:
    """Why the operators cannot do what an attention does."""
    others = further_parts(attention, *parts)
    if others is not None:
        return others
    if getattr(attention, "attn_drop", 0):
        return "it drops attention weights, which the operators do not"
    if hasattr(attention, "scale_mul_1H11"):
        if attention.scale_mul_1H11.numel() != attention.num_heads:
            return "scale_mul_1H11 is not one number a head"
        if not math.isclose(attention.max_scale_mul, math.log(100), abs_tol=1e-6):
            return f"its scales are cut at exp({attention.max_scale_mul}), the operators cut at 100"
    return None


class KVCaching:
    """Methods of any attention with a cache that grows."""

    def kv_caching(self: Any, enable: bool) -> None:
        own(self).run.start(enable)
        own(self).former["kv_caching"](enable)


class SelfAttention:
    """Methods of VAR's attention."""

    def forward(self: Any, x: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        known, tokens = own(self), x.shape[1]
        schedule = known.schedule
        if samples(self, attn_bias is None):
            capacity = tokens if schedule is None else schedule.num_tokens
            out = attend_to_cache(self, *queries_keys_values(self, x), capacity, log_scale(self))
        else:
            seen = schedule.with_num_tokens(tokens) if schedule and tokens in schedule.ends else None
            diagonal = masked(known, attn_bias, seen, tokens)
            if self.caching or seen is None or diagonal is None:
                return known.former["forward"](x, attn_bias)
            out = attend_to_scales(self, *queries_keys_values(self, x), seen, block_diagonal=diagonal)
        return self.proj_drop(self.proj(out.flatten(2)))


# -- blocks ------------------------------------------------------------------------------------------------------------


def modulations(block: Any, condition: torch.Tensor) -> Sequence[torch.Tensor]:
    """gate1, gate2, scale1, scale2, shift1, shift2 of a block, (B, C) each."""

    def make() -> Sequence[torch.Tensor]:
        if hasattr(block, "ada_gss"):
            rows = (block.ada_gss + condition).squeeze(1)
        else:
            rows = block.ada_lin(condition).view(-1, 6, block.C)
        return rows.unbind(1)

    return own(block).run.once(block, make, condition)


def norm_obstacle(block: Any) -> str | None:
    """Why the norm of a block, or before the head, is not the operators'."""
    norm = block.ln_wo_grad
    if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
        return f"its norm is {norm}, expected a LayerNorm without weights"
    if getattr(block, "fused_add_norm_fn", None) is not None:
        return "it adds and normalises in one function of its own"
    return None


def block_obstacle(block: Any) -> str | None:
    """Why the operators cannot do what a block does."""
    return further_parts(block, *PARTS_OF_BLOCK) or norm_obstacle(block)


class Block:
    """Methods of VAR's block."""

    def forward(self: Any, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulations(self, cond_BD)
        eps = self.ln_wo_grad.eps
        x = x.to(torch.promote_types(x.dtype, gate2.dtype))  # as adding the gated MLP does
        h = self.attn(adaptive_layer_norm(x, scale1, shift1, eps=eps), attn_bias=attn_bias)
        x, h = gated_residual_norm(x, self.drop_path(h), gate1, scale2, shift2, eps=eps)
        return gated_residual(x, self.drop_path(self.ffn(h)), gate2)


class HeadNorm:
    """Methods of the norm before the head."""

    def forward(self: Any, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        def make() -> Sequence[torch.Tensor]:
            return self.ada_lin(cond_BD).view(-1, 2, self.C).unbind(1)

        if cond_BD.ndim != 2:
            return own(self).former["forward"](x_BLC, cond_BD)
        scale, shift = own(self).run.once(self, make, cond_BD)
        return adaptive_layer_norm(x_BLC, scale, shift, eps=self.ln_wo_grad.eps)


# -- quantizer ---------------------------------------------------------------------------------------------------------


def convolutions(quantizer: Any, scales: int) -> ResidualConv | None:
    """The convolutions of a quantizer, as its scales share them; None if there are none."""
    of_scales = [quantizer.quant_resi[k / max(scales - 1, 1)] for k in range(scales)]
    if all(isinstance(phi, nn.Identity) for phi in of_scales):
        return None
    each = list(dict.fromkeys(of_scales))
    weight, bias = (torch.stack([getattr(phi, name) for phi in each]) for name in ("weight", "bias"))
    return ResidualConv(weight, bias, each[0].resi_ratio, tuple(each.index(phi) for phi in of_scales))


def quantizer_obstacle(quantizer: Any) -> str | None:
    """Why the operators cannot do what a quantizer does."""
    scales = len(quantizer.v_patch_nums)
    if scales < 2:
        return "it has one scale"
    phis = [quantizer.quant_resi[k / (scales - 1)] for k in range(scales)]
    if all(isinstance(phi, nn.Identity) for phi in phis):
        return None
    plain = all(isinstance(phi, nn.Conv2d) and hasattr(phi, "resi_ratio") and phi.bias is not None for phi in phis)
    if not plain or any(phi.kernel_size != (3, 3) or phi.resi_ratio != phis[0].resi_ratio for phi in phis):
        return "its convolutions are not 3 x 3 of one ratio"
    return None


def quantized(
    quantizer: Any, features: torch.Tensor, v_patch_nums: Sequence[Any] | None, znorm: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens of each scale, and the inputs of teacher forcing, for which a trainer asks next."""
    schedule = ScaleSchedule(tuple(v_patch_nums or quantizer.v_patch_nums))
    phi = convolutions(quantizer, len(schedule))
    found = residual_quantize(features, quantizer.embedding.weight, schedule, phi=phi, znorm=znorm)
    tokens = list(found.tokens.split(schedule.lengths, 1))
    own(quantizer).quantized = tuple(tokens[:-1]), _versions(tokens[:-1]), found.teacher_forcing
    return tokens, found.teacher_forcing


def inputs_of(quantizer: Any, tokens: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The inputs of teacher forcing for tokens of each scale, of which the last need not be there; None if they are not
    all tokens."""
    schedule = ScaleSchedule(tuple(quantizer.v_patch_nums))
    learning = torch.is_grad_enabled() and any(p.requires_grad for p in quantizer.parameters())
    kept, own(quantizer).quantized = own(quantizer).quantized, None
    tokens = tokens[: len(schedule) - 1]
    if len(tokens) < len(schedule) - 1 or any(each.ndim != 2 for each in tokens):
        return None
    if kept is not None and not learning:
        known, versions, inputs = kept
        same = len(known) == len(tokens) and all(a is b for a, b in zip(known, tokens, strict=True))
        if same and versions is not None and versions == _versions(known):
            return inputs
    phi, codebook = convolutions(quantizer, len(schedule)), quantizer.embedding.weight
    feature_map = codebook.new_zeros(len(tokens[0]), quantizer.Cvae, *schedule.finest, dtype=torch.float32)
    found = []
    for k, of_scale in enumerate(tokens):
        feature_map, following = accumulate_scale(of_scale, feature_map, codebook, schedule, k, phi=phi)
        found.append(following)
    return torch.cat(found, 1)  # type: ignore[arg-type]  # the last scale, which has none, is not among them


class Quantizer:
    """Methods of VAR's quantizer."""

    def f_to_idxBl_or_fhat(
        self: Any, f_BChw: torch.Tensor, to_fhat: bool, v_patch_nums: Sequence[Any] | None = None
    ) -> list[torch.Tensor]:
        if to_fhat or getattr(self, "prog_si", -1) >= 0:
            return own(self).former["f_to_idxBl_or_fhat"](f_BChw, to_fhat, v_patch_nums)
        return quantized(self, f_BChw, v_patch_nums, self.using_znorm)[0]

    def idxBl_to_var_input(self: Any, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor | None:
        found = None if self.prog_si >= 0 else inputs_of(self, gt_ms_idx_Bl)
        return own(self).former["idxBl_to_var_input"](gt_ms_idx_Bl) if found is None else found

    def get_next_autoregressive_input(
        self: Any, si: int, SN: int, f_hat: torch.Tensor, h_BChw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        schedule = ScaleSchedule(tuple(self.v_patch_nums))
        if len(schedule) != SN:
            return own(self).former["get_next_autoregressive_input"](si, SN, f_hat, h_BChw)
        # the vectors of this scale are its codebook, as they need not be codes
        codes = h_BChw.flatten(2).mT.flatten(0, 1)
        tokens = torch.arange(len(codes), device=codes.device).view(len(h_BChw), -1)
        phi = own(self).run.once(self, lambda: convolutions(self, SN), self.embedding.weight)
        feature_map, following = accumulate_scale(tokens, f_hat, codes, schedule, si, phi=phi)
        f_hat.copy_(feature_map)  # the public code adds in place
        return f_hat, f_hat if following is None else following.to(f_hat.dtype).mT.unflatten(2, schedule[si + 1])


def _versions(tokens: Sequence[torch.Tensor]) -> list[int] | None:
    """By which a change in place is seen, if tensors keep them."""
    return None if any(each.is_inference() for each in tokens) else [each._version for each in tokens]


PATCHES = (
    Patch(
        "attention",
        "attention without a dense mask in training, with a preallocated cache in sampling",
        ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "caching", "cached_k", "cached_v", "num_heads", "scale"),
        SelfAttention,
        attention_obstacle,
        "keys are kept in the dtype of the products, also under autocast",
    ),
    Patch(
        "blocks",
        "norms and gated residuals in one, modulations once an image",
        ("attn", "ffn", "ln_wo_grad", "drop_path"),
        Block,
        block_obstacle,
    ),
    Patch("blocks", "norm before the head in one", ("ln_wo_grad", "ada_lin", "C", "D"), HeadNorm, norm_obstacle),
    Patch(
        "quantizer",
        "tokens and inputs of teacher forcing of all scales in one",
        ("quant_resi", "v_patch_nums", "using_znorm", "embedding", "Cvae", "prog_si"),
        Quantizer,
        quantizer_obstacle,
    ),
)
