"""A small Switti with the attributes of the public one, as code that people have, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.public_var import MLP, PATCHES, HeadNorm, Quantizer, sample_with_top_k_top_p_, wide

WIDTH, HEADS, TEXT = 16, 2, 12
LENGTH = sum(side * side for side in PATCHES)


class SwittiQuantizer(Quantizer):
    def __init__(self) -> None:
        super().__init__(32, 4)
        del self.prog_si

    def f_to_idxBl_or_fhat(
        self, f_BChw: torch.Tensor, to_fhat: bool, v_patch_nums: Any = None, noise_std: float | None = None
    ) -> list[torch.Tensor]:
        noise = 0 if noise_std is None else noise_std
        return super().f_to_idxBl_or_fhat(f_BChw * (1 - noise), to_fhat, v_patch_nums)

    def idxBl_to_switti_input(self, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor:
        return self.idxBl_to_var_input(gt_ms_idx_Bl)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.2 + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = wide(x)
        return (long * (long.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qk_norm, self.scale, self.attn_drop = HEADS, True, (WIDTH // HEADS) ** -0.5, 0.0
        self.q_norm, self.k_norm = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def heads(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in tensors]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class ImageAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, attn_bias: Any, freqs_cis: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        q, k, v = self.heads(self.q_norm(q), self.k_norm(k), v)
        if freqs_cis is not None:
            turns = freqs_cis[:, : x.shape[1]].to(torch.complex128 if q.dtype == torch.double else torch.complex64)
            q, k = (
                torch.view_as_real(torch.view_as_complex(wide(t).unflatten(-1, (-1, 2))) * turns).flatten(3).to(t.dtype)
                for t in (q, k)
            )
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat([self.cached_k, k], 2)
            self.cached_v = v if self.cached_v is None else torch.cat([self.cached_v, v], 2)
            k, v = self.cached_k, self.cached_v
        return self.attend(q, k, v, attn_bias)


class TextAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(TEXT, 2 * WIDTH)

    def forward(self, x: Any, context: Any, context_attn_bias: Any = None, freqs_cis: Any = None) -> torch.Tensor:
        (q,) = self.heads(self.q_norm(self.to_q(x)))
        if self.cached_k is None:
            k, v = self.to_kv(context).chunk(2, -1)
            k, v = self.heads(self.k_norm(k), v)
            if self.caching:
                self.cached_k, self.cached_v = k, v
        else:
            k, v = self.cached_k, self.cached_v
        mask = None if context_attn_bias is None else context_attn_bias[:, None, None].to(v.dtype)
        return self.attend(q, k, v, mask)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.C, self.use_crop_cond, self.drop_path = WIDTH, True, nn.Identity()
        self.attn, self.cross_attn, self.ffn = ImageAttention(), TextAttention(), MLP(WIDTH)
        for part in ("self_attention", "cross_attention", "ffn"):
            for side in (1, 2):
                setattr(self, f"{part}_norm{side}", RMSNorm(WIDTH))
        self.attention_y_norm, self.crop_cond_scales = RMSNorm(TEXT), nn.Parameter(torch.randn(1, WIDTH))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(
        self, x: Any, cond_BD: Any, attn_bias: Any, crop_cond: Any = None, context: Any = None,
        context_attn_bias: Any = None, freqs_cis: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        rows = self.ada_lin(cond_BD + self.crop_cond_scales * crop_cond).view(-1, 1, 6, WIDTH)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.unbind(2)
        h = self.attn(self.self_attention_norm1(x) * (1 + scale1) + shift1, attn_bias=attn_bias, freqs_cis=freqs_cis)
        x = x + self.self_attention_norm2(h) * gate1
        h = self.cross_attn(self.cross_attention_norm1(x), self.attention_y_norm(context), context_attn_bias)
        x = x + self.cross_attention_norm2(h)
        return x + self.ffn_norm2(self.ffn(self.ffn_norm1(x) * (1 + scale2) + shift2)) * gate2


class PublicSwitti(nn.Module):
    """`use_ar`: whether scales see those before them."""

    def __init__(self, use_ar: bool = False) -> None:
        super().__init__()
        self.patch_nums, self.use_ar = PATCHES, use_ar
        angle = torch.rand(1, LENGTH, WIDTH // HEADS // 2) * 6
        self.freqs_cis = torch.polar(torch.ones_like(angle), angle)
        self.word_embed, self.text_pooler = nn.Linear(4, WIDTH), nn.Linear(TEXT, WIDTH)
        self.crop = nn.Parameter(torch.randn(1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        level = torch.cat([torch.full((side * side,), k) for k, side in enumerate(PATCHES)])
        seen = level[:, None] >= level if use_ar else level[:, None] == level
        self.register_buffer("attn_bias_for_masking", torch.where(seen, 0.0, -math.inf)[None, None])
        self.head_nm, self.head = HeadNorm(WIDTH), nn.Linear(WIDTH, 32)

    def forward(self, x_BLCv_wo_first_l: torch.Tensor, prompt_embeds: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        condition = self.text_pooler(prompt_embeds[:, 0])
        x = torch.cat([condition[:, None], self.word_embed(x_BLCv_wo_first_l)], 1)
        for block in self.blocks:
            x = block(
                x=x, cond_BD=condition, attn_bias=self.attn_bias_for_masking.to(x.dtype), crop_cond=self.crop,
                context=prompt_embeds, context_attn_bias=bias, freqs_cis=self.freqs_cis,
            )  # fmt: skip
        return wide(self.head(self.head_nm(x, condition)))


class PublicPipeline:
    """It samples feature maps, and gives up guidance at a scale."""

    def __init__(self, use_ar: bool = False) -> None:
        self.switti, self.vae = PublicSwitti(use_ar).eval(), nn.Module()
        self.vae.quantize = SwittiQuantizer()

    @torch.inference_mode()
    def __call__(
        self, texts: torch.Tensor, bias: torch.Tensor, seed: int = 0, top_k: int = 0, top_p: float = 0.0,
        more_smooth: bool = False, alone_from: int = 2,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rng, switti, quantizer = torch.Generator().manual_seed(seed), self.switti, self.vae.quantize
        condition = switti.text_pooler(texts[:, 0])
        batch, crop = len(texts) // 2, switti.crop.expand(len(texts), -1)
        x, start, drawn = condition[:, None], 0, []
        f_hat = condition.new_zeros(batch, 4, 4, 4)
        for block in switti.blocks:
            block.attn.kv_caching(switti.use_ar)
            block.cross_attn.kv_caching(True)
        for k, side in enumerate(PATCHES):
            if k >= alone_from:
                x, texts, bias, condition, crop = (t[:batch] for t in (x, texts, bias, condition, crop))
                for cache in (each for block in switti.blocks for each in (block.attn, block.cross_attn)):
                    if cache.cached_k is not None:
                        cache.cached_k, cache.cached_v = cache.cached_k[:batch], cache.cached_v[:batch]
            turns = switti.freqs_cis[:, start : start + side * side]
            start += side * side
            for block in switti.blocks:
                x = block(
                    x=x, cond_BD=condition, attn_bias=None, crop_cond=crop, context=texts, context_attn_bias=bias,
                    freqs_cis=turns,
                )  # fmt: skip
            logits = switti.head(switti.head_nm(x, condition))
            if k < alone_from:
                logits = 2 * logits[:batch] - logits[batch:]
            drawn.append(sample_with_top_k_top_p_(logits, rng=rng, top_k=top_k, top_p=top_p)[..., 0])
            codes = quantizer.embedding(drawn[-1]).mT.unflatten(2, (side, side))
            f_hat, x = quantizer.get_next_autoregressive_input(k, 4, f_hat, codes)
            if k < 3:
                x = switti.word_embed(x.view(batch, 4, -1).mT).repeat(2, 1, 1)
        for block in switti.blocks:
            block.attn.kv_caching(False)
            block.cross_attn.kv_caching(False)
        return torch.cat(drawn, 1), f_hat
