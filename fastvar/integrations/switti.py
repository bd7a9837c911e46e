"""The public Switti (yandex-research/switti) and forks of it that kept the names of its attributes.

Its scales see themselves alone, unless it was made with `use_ar`; queries and keys are normalised over all heads by a
LayerNorm, which it does itself; its RMS norms too. It keeps keys and values of texts itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from fastvar.integrations import var
from fastvar.integrations.patching import Applied, Left, Patch, own
from fastvar.integrations.var import (
    Tables,
    attend_to_cache,
    further_parts,
    inputs_of,
    masked,
    quantizer_obstacle,
    samples,
)
from fastvar.ops import block_causal_attention, cached_attention, gated_residual, qk_norm_rope

# -- attention ---------------------------------------------------------------------------------------------------------


def tables(turns: torch.Tensor, tokens: int, device: torch.device) -> Tables:
    """cos and sin (n, D/2) of the first tokens of complex numbers (1, L, D/2), which may lie on the CPU."""
    here = turns[0, :tokens].to(device)
    return here.real.contiguous(), here.imag.contiguous()


class SelfAttention:
    """Methods of Switti's attention of image tokens."""

    def forward(
        self: Any, x: torch.Tensor, attn_bias: torch.Tensor | None, freqs_cis: torch.Tensor | None = None
    ) -> torch.Tensor:
        known, tokens = own(self), x.shape[1]
        plain = attn_bias is None and not torch.is_grad_enabled()
        sampling = samples(self, plain) if self.caching else plain
        schedule = known.schedule
        seen = schedule.with_num_tokens(tokens) if schedule and tokens in schedule.ends else None
        diagonal = masked(known, attn_bias, seen, tokens)
        if not sampling and (self.caching or seen is None or diagonal is None):
            return known.former["forward"](x, attn_bias, freqs_cis)
        rope = None
        if freqs_cis is not None:
            name = "turns", tokens, x.device, torch.is_inference_mode_enabled()
            rope = known.run.keep(name, partial(tables, freqs_cis, tokens, x.device), freqs_cis)
        q, k, v = self.to_qkv(x).chunk(3, -1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.to(v.dtype).unflatten(2, (self.num_heads, -1)) for t in (q, k, v))
        if sampling and self.caching:
            out = attend_to_cache(self, q, k, v, tokens if schedule is None else schedule.num_tokens, rope=rope)
        else:
            if rope is not None:
                q, k = qk_norm_rope(q, k, rope=rope)
            if sampling:  # a scale that sees itself alone
                out = cached_attention(q, k, v, softmax_scale=self.scale)
            else:
                assert seen is not None and diagonal is not None
                out = block_causal_attention(q, k, v, seen, softmax_scale=self.scale, block_diagonal=diagonal)
        return self.proj_drop(self.proj(out.flatten(2)))


def attention_obstacle(attention: Any) -> str | None:
    """Why the operators cannot do what an attention does."""
    if attention.attn_drop:
        return "it drops attention weights, which the operators do not"
    return further_parts(attention, "q_norm", "k_norm", "to_qkv", "proj", "proj_drop")


def leave_texts(applied: Applied, objects: Iterable[tuple[str, Any]]) -> None:
    """Say of attention to texts that nothing is to be done."""
    for place, found in objects:
        if all(hasattr(found, name) for name in ("to_q", "to_kv", "q_norm", "k_norm", "cached_k")):
            why = "it keeps keys and values of texts itself"
            applied.left.append(Left("texts", place, type(found).__name__, why))


# -- blocks ------------------------------------------------------------------------------------------------------------


_NORMS = [f"{place}_norm{side}" for place in ("self_attention", "cross_attention", "ffn") for side in (1, 2)]
_PARTS_OF_BLOCK = ("attn", "cross_attn", "ffn", "drop_path", "attention_y_norm", "ada_lin", "crop_cond_scales", *_NORMS)


class Block:
    """Methods of Switti's block. Its norms are called; the texts are normalised where keys are made of them."""

    def forward(
        self: Any,
        x: torch.Tensor,
        cond_BD: torch.Tensor,
        attn_bias: torch.Tensor | None,
        crop_cond: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_attn_bias: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def make() -> Sequence[torch.Tensor]:
            condition = cond_BD + self.crop_cond_scales * crop_cond if self.use_crop_cond else cond_BD
            gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition).view(-1, 6, self.C).unbind(1)
            return gate1, gate2, *(row[:, None] for row in (1 + scale1, 1 + scale2, shift1, shift2))

        gate1, gate2, scale1, scale2, shift1, shift2 = own(self).run.once(self, make, cond_BD, crop_cond)
        # as adding what is normalised and gated does
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, gate1.dtype), self.ffn_norm2.weight.dtype))
        h = self.attn(self.self_attention_norm1(x) * scale1 + shift1, attn_bias=attn_bias, freqs_cis=freqs_cis)
        x = gated_residual(x, self.self_attention_norm2(h), gate1)
        if context is not None:
            texts = context if self.cross_attn.cached_k is not None else self.attention_y_norm(context)
            options = {"context_attn_bias": context_attn_bias, "freqs_cis": freqs_cis}
            x = x + self.cross_attention_norm2(self.cross_attn(self.cross_attention_norm1(x), texts, **options))
        return gated_residual(x, self.ffn_norm2(self.ffn(self.ffn_norm1(x) * scale2 + shift2)), gate2)


# -- quantizer ---------------------------------------------------------------------------------------------------------


class Quantizer:
    """Methods of Switti's quantizer."""

    f_to_idxBl_or_fhat = var.Quantizer.f_to_idxBl_or_fhat
    get_next_autoregressive_input = var.Quantizer.get_next_autoregressive_input

    def idxBl_to_switti_input(self: Any, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor | None:
        found = inputs_of(self, gt_ms_idx_Bl)
        return own(self).former["idxBl_to_switti_input"](gt_ms_idx_Bl) if found is None else found


PATCHES = (
    Patch(
        "attention",
        "attention without a dense mask in training, without one or with a preallocated cache in sampling; positions",
        ("to_qkv", "q_norm", "k_norm", "qk_norm", "caching", "cached_k", "cached_v", "num_heads", "scale"),
        SelfAttention,
        attention_obstacle,
        "keys are kept in the dtype of the products, also under autocast",
        "its LayerNorm of queries and keys over all heads: the operators normalise a head",
    ),
    Patch(
        "blocks",
        "gated residuals in one, modulations and normed texts once an image",
        ("attn", "cross_attn", "ffn", "attention_y_norm", "ada_lin", "use_crop_cond", *_NORMS),
        Block,
        lambda block: further_parts(block, *_PARTS_OF_BLOCK),
        stays="its RMS norms: the operators have none",
    ),
    Patch(
        "quantizer",
        "tokens and inputs of teacher forcing of all scales in one",
        ("quant_resi", "v_patch_nums", "using_znorm", "embedding", "Cvae", "idxBl_to_switti_input"),
        Quantizer,
        quantizer_obstacle,
    ),
)
