"""The public HART (mit-han-lab/hart) and forks of it that kept the names of its attributes.

Its texts are the first scale of the sequence, and see themselves alone. Its positions differ from sample to sample, and
the two halves of a pair of channels turn by angles of their own, of the row and of the column: no rotation, which the
operators would do; it makes the angles itself, once a scale. Its RMS norms, the last scale's steps and the diffusion of
the residual are its own too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from fastvar.integrations import var
from fastvar.integrations.patching import Own, Patch, own
from fastvar.integrations.var import (
    PARTS_OF_ATTENTION,
    PARTS_OF_BLOCK,
    Tables,
    attend_to_cache,
    attention_obstacle,
    further_parts,
    inputs_of,
    log_scale,
    quantized,
    quantizer_obstacle,
    queries_keys_values,
    samples,
)
from fastvar.ops import PrefixKV, block_causal_attention, gated_residual, qk_norm_rope
from fastvar.schedule import ScaleSchedule

# -- attention ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def cells(sides: tuple[int, ...], largest: int, device: torch.device) -> torch.Tensor:
    """Row and column of each token of square grids, in cells of the largest, (n, 2)."""
    each = [torch.arange(side, device=device) / side * largest for side in sides]
    return torch.cat([torch.cartesian_prod(at, at).view(-1, 2) for at in each])


def angles(
    attention: Any, v: torch.Tensor, scale: int, texts: torch.Tensor, chosen: Sequence[torch.Tensor] | None
) -> Tables:
    """cos and sin (B, n, 1, D) of the tokens of a scale, 0 for the texts, -1 for all. Image tokens follow the position
    of the last of the texts (B, T); of these, or of the scale's, only the chosen ones are there."""
    found = [attention.context_rotary_emb(v, texts)] if scale <= 0 else []
    if scale != 0:
        sides = tuple(attention.patch_nums)[1:]
        at = cells(sides if scale < 0 else sides[scale - 1 : scale], sides[-1], v.device)
        at = at.expand(len(v), -1, -1)
        if chosen is not None:
            at = at[tuple(chosen)].view(len(v), -1, 2)
        found.append(attention.rotary_emb(v, at + texts[:, -1, None, None]))
    cos, sin = (torch.cat(each, 1)[:, :, None] for each in zip(*found, strict=True))
    return cos, sin


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, n, H, D), each channel with that half a head away."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def lengths_of(attention: Any, tokens: int) -> tuple[int, ...] | None:
    """Tokens of texts and of each grid, of the last as many as are there; None if there are too few."""
    before = (attention.context_token, *(side * side for side in attention.patch_nums[1:-1]))
    return (*before, tokens - sum(before)) if tokens > sum(before) else None


def is_seen(known: Own, mask: torch.Tensor | None, lengths: tuple[int, ...] | None) -> bool:
    """Whether a dense mask shows each scale itself and those before it."""
    if mask is None or lengths is None or tuple(mask.shape) != (1, 1, sum(lengths), sum(lengths)):
        return False
    return known.run.block_diagonal(mask, lengths) is False


def attend_to_scales(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], softmax_scale: float
) -> torch.Tensor:
    """Teacher forcing, (B, L, H, D) each: texts see themselves, grids texts and grids, what is left of the last one, in
    any number, all."""
    texts, end = lengths[0], sum(lengths[:-1])
    schedule = ScaleSchedule([(1, length) for length in lengths[1:-1]])
    prefix = PrefixKV(k[:, :texts], v[:, :texts])
    of_grids = q[:, texts:end], k[:, texts:end], v[:, texts:end]
    return torch.cat(
        [
            _attend(q[:, :texts], *prefix[:2], softmax_scale),
            block_causal_attention(*of_grids, schedule, prefix=prefix, softmax_scale=softmax_scale),
            _attend(q[:, end:], k, v, softmax_scale),
        ],
        1,
    )


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class Attention:
    """Methods of HART's attention."""

    def forward(
        self: Any,
        x: torch.Tensor,
        attn_bias: torch.Tensor | None,
        si: int = -1,
        context_position_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        m_maskgit: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        known, caching = own(self), samples(self, attn_bias is None and context_position_ids is not None)
        lengths = None if caching else lengths_of(self, x.shape[1])
        if context_position_ids is None or (not caching and (self.caching or not is_seen(known, attn_bias, lengths))):
            arguments = attn_bias, si, context_position_ids, context_mask, m_maskgit
            return known.former["forward"](x, *arguments)
        q, k, v = queries_keys_values(self, x)
        scale, texts = log_scale(self), context_position_ids
        if scale is not None:
            q, k = qk_norm_rope(q, k, log_scale=scale)
        name = "angles", si, self.rope_theta, v.shape[3], v.dtype
        cos, sin = known.run.once(name, lambda: angles(self, v, si, texts, m_maskgit), texts, m_maskgit)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if caching:
            capacity = self.context_token + sum(side * side for side in self.patch_nums[1:])
            out = attend_to_cache(self, q, k, v, capacity)
        else:
            assert lengths is not None
            out = attend_to_scales(q, k, v, lengths, self.scale)
        return self.proj_drop(self.proj(out.flatten(2)))


_PARTS_OF_ATTENTION = (*PARTS_OF_ATTENTION, "qkv_proj", "rotary_emb", "context_rotary_emb")
_UNUSED = ("rotary_emb_fused_with_pos", "context_rotary_emb_fused_with_pos")


def hart_attention_obstacle(attention: Any) -> str | None:
    """Why the operators cannot do what an attention does."""
    if not attention.context_token:
        return "it has no texts before the image"
    if len(attention.patch_nums) < 3:
        return "it has fewer than three scales"
    return attention_obstacle(attention, (*_PARTS_OF_ATTENTION, *_UNUSED))


# -- blocks ------------------------------------------------------------------------------------------------------------


def pooled(texts: torch.Tensor, mask: torch.Tensor | None, mode: str) -> torch.Tensor:
    """The largest or the mean of texts (B, T, C), (B, C); one that is pooled already as it is."""
    if texts.ndim == 2:
        return texts
    if mode == "max":
        return texts.max(1).values
    assert mask is not None
    return (texts * mask[..., None].to(texts.dtype)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class Block:
    """Methods of HART's block. Its norm is called."""

    def forward(
        self: Any,
        x: torch.Tensor,
        cond_BD: torch.Tensor,
        attn_bias: torch.Tensor | None,
        si: int = -1,
        context_position_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        m_maskgit: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        def make() -> Sequence[torch.Tensor]:
            if self.disable_aln:
                rows = self.scale_shift_table + pooled(cond_BD, context_mask, "avg")[:, None]
            else:
                rows = self.ada_lin(pooled(cond_BD, context_mask, self.sep_aln_pooling_mode)).view(-1, 6, self.C)
            gate1, gate2, scale1, scale2, shift1, shift2 = rows.unbind(1)
            return gate1, gate2, *(row[:, None] for row in (1 + scale1, 1 + scale2, shift1, shift2))

        gate1, gate2, scale1, scale2, shift1, shift2 = own(self).run.once(self, make, cond_BD, context_mask)
        x = x.to(torch.promote_types(x.dtype, gate1.dtype))  # as adding what is gated does
        h = self.attn(
            self.ln_wo_grad(x) * scale1 + shift1,
            attn_bias=attn_bias,
            context_position_ids=context_position_ids,
            context_mask=context_mask,
            si=si,
            m_maskgit=m_maskgit,
        )
        x = gated_residual(x, self.drop_path(h), gate1)
        return gated_residual(x, self.drop_path(self.ffn(self.ln_wo_grad(x) * scale2 + shift2)), gate2)


def block_obstacle(block: Any) -> str | None:
    """Why the operators cannot do what a block does."""
    if block.disable_aln and not block.shared_aln:
        return "it has no modulation"
    if not block.disable_aln and block.sep_aln_pooling_mode not in ("avg", "max"):
        return f"it pools texts by {block.sep_aln_pooling_mode}"
    return further_parts(block, *PARTS_OF_BLOCK, "scale_shift_table", "cross_attn" if block.cross_attn is None else "")


# -- quantizer ---------------------------------------------------------------------------------------------------------


def is_own(quantizer: Any, patch_nums: Sequence[Any] | None) -> bool:
    """Whether grids that a method was given are the quantizer's own."""
    return patch_nums is None or tuple(patch_nums) == tuple(quantizer.v_patch_nums)


class Quantizer:
    """Methods of HART's quantizer of tokens and a residual; the last scale passes no convolution."""

    f_to_idxBl_or_fhat = var.Quantizer.f_to_idxBl_or_fhat

    def f_to_idxBl_and_frest(
        self: Any, f_BChw: torch.Tensor, v_patch_nums: Sequence[Any] | None = None, **kwargs: Any
    ) -> list[torch.Tensor]:
        tokens, inputs = quantized(self, f_BChw, v_patch_nums, znorm=False)
        # the last input is what all scales before the last add up to, at the same size
        rest = f_BChw.detach() - inputs[:, -tokens[-1].shape[1] :].mT.unflatten(2, f_BChw.shape[2:])
        return [*tokens, rest.flatten(2).mT]

    def idxBl_to_var_input(
        self: Any, gt_ms_idx_Bl: list[torch.Tensor], patch_nums: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        found = inputs_of(self, gt_ms_idx_Bl) if self.prog_si < 0 and is_own(self, patch_nums) else None
        return own(self).former["idxBl_to_var_input"](gt_ms_idx_Bl, patch_nums) if found is None else found

    def get_next_autoregressive_input(
        self: Any,
        si: int,
        SN: int,
        f_hat: torch.Tensor,
        h_BChw: torch.Tensor,
        patch_nums: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        former = own(self).former["get_next_autoregressive_input"]
        if si == SN - 1 or not is_own(self, patch_nums):
            return former(si, SN, f_hat, h_BChw, patch_nums)
        return var.Quantizer.get_next_autoregressive_input(self, si, SN, f_hat, h_BChw)


PATCHES = (
    Patch(
        "attention",
        "attention without a dense mask in training, with a preallocated cache in sampling; angles once a scale",
        (
            "qkv_proj",
            "q_bias",
            "v_bias",
            "zero_k_bias",
            "rotary_emb",
            "context_token",
            "patch_nums",
            "caching",
            "scale",
        ),
        Attention,
        hart_attention_obstacle,
        "keys are kept in the dtype of the products, also under autocast",
        "its positions: the halves of a pair turn by angles of their own, and by others in each sample",
    ),
    Patch(
        "blocks",
        "gated residuals in one, modulations once an image",
        ("attn", "ffn", "ln_wo_grad", "drop_path", "disable_aln", "sep_aln_pooling_mode", "cross_attn"),
        Block,
        block_obstacle,
        stays="its RMS norms: the operators have none",
    ),
    Patch(
        "quantizer",
        "tokens, residual and inputs of teacher forcing of all scales in one",
        ("quant_resi", "v_patch_nums", "embedding", "Cvae", "prog_si", "f_to_idxBl_and_frest"),
        Quantizer,
        quantizer_obstacle,
    ),
)
