"""A small HART with the attributes of the public one, as code that people have, in plain PyTorch. Its last scale is
drawn in two steps, without the diffusion."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.public_switti import RMSNorm
from tests.helpers.public_var import MLP, PATCHES, DropRows, Quantizer, sample_with_top_k_top_p_, wide

WIDTH, HEADS, TEXTS = 16, 2, 3
LENGTH = TEXTS + sum(side * side for side in PATCHES[1:])
LAST = PATCHES[-1] ** 2


class HybridQuantizer(Quantizer):
    def __init__(self) -> None:
        super().__init__(32, 4)

    def f_to_idxBl_or_fhat(
        self, f_BChw: torch.Tensor, to_fhat: bool, v_patch_nums: Any = None, exception_stages: Any = None
    ) -> list[torch.Tensor]:
        return super().f_to_idxBl_or_fhat(f_BChw, to_fhat, v_patch_nums)

    def f_to_idxBl_and_frest(self, f_BChw: torch.Tensor, v_patch_nums: Any = None, **kwargs: Any) -> list[torch.Tensor]:
        tokens, rest = super().f_to_idxBl_or_fhat(f_BChw, False, v_patch_nums), f_BChw.detach()
        for k, side in enumerate(PATCHES[:-1]):
            rest = rest - self._added(k, self.embedding(tokens[k]).mT.unflatten(2, (side, side)))
        return [*tokens, rest.flatten(2).mT]

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[torch.Tensor], patch_nums: Any = None) -> torch.Tensor:
        return super().idxBl_to_var_input(gt_ms_idx_Bl)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: torch.Tensor, h_BChw: torch.Tensor, patch_nums: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if si == SN - 1:
            return f_hat.add_(h_BChw), f_hat
        return super().get_next_autoregressive_input(si, SN, f_hat, h_BChw)


class Rotary(nn.Module):
    """Angles of positions (B, n) or (B, n, 2): (B, n, D), twice as many as there are frequencies for each."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        head = WIDTH // HEADS
        frequencies = 10000.0 ** -(torch.arange(0, head, 2 * axes) / head)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = position_ids.float() if position_ids.ndim == 3 else position_ids.float()[..., None]
        angle = at[..., None] * self.inv_freq.float()
        angle = torch.cat([angle, angle], -1).flatten(2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cosine: bool) -> None:
        super().__init__()
        self.num_heads, self.attn_drop, self.scale = HEADS, 0.0, 0.25 * (WIDTH // HEADS) ** -0.5
        self.context_token, self.patch_nums, self.rope_theta = TEXTS, PATCHES, 10000
        if cosine:
            self.scale_mul_1H11, self.max_scale_mul = nn.Parameter(torch.randn(1, HEADS, 1, 1) + 1), math.log(100)
            self.scale = 1.0
        self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.rotary_emb, self.context_rotary_emb = Rotary(2), Rotary(1)
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def positions(self, v: torch.Tensor, si: int, texts: torch.Tensor, chosen: Any) -> list[torch.Tensor]:
        found = [self.context_rotary_emb(v, texts)] if si <= 0 else []
        if si:
            sides = PATCHES[1:] if si < 0 else PATCHES[si : si + 1]
            at = torch.tensor([(i, j) for n in sides for i in range(n) for j in range(n)])
            at = at / torch.tensor([n for n in sides for _ in range(n * n)])[:, None] * PATCHES[-1]
            at = at.repeat(len(v), 1, 1)
            at = at if chosen is None else at[chosen].view(len(v), -1, 2)
            found.append(self.rotary_emb(v, at + texts[:, -1:, None]))
        return [torch.cat(each, 1)[:, None] for each in zip(*found, strict=True)]

    def forward(
        self, x: Any, attn_bias: Any, si: int = -1, context_position_ids: Any = None, context_mask: Any = None,
        m_maskgit: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv_proj.weight, bias).unflatten(2, (3, HEADS, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        if hasattr(self, "scale_mul_1H11"):
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        cos, sin = self.positions(v, si, context_position_ids, m_maskgit)
        q, k = (
            t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k)
        )
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat([self.cached_k, k], 2)
            self.cached_v = v if self.cached_v is None else torch.cat([self.cached_v, v], 2)
            k, v = self.cached_k, self.cached_v
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """`table`: whether modulations are sums with a table rather than of a layer."""

    def __init__(self, cosine: bool, table: bool) -> None:
        super().__init__()
        self.C, self.disable_aln, self.shared_aln, self.sep_aln_pooling_mode = WIDTH, table, table, "max"
        self.attn, self.ffn, self.drop_path, self.cross_attn = Attention(cosine), MLP(WIDTH), DropRows(), None
        self.ln_wo_grad = RMSNorm(WIDTH)
        if table:
            self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(
        self, x: Any, cond_BD: Any, attn_bias: Any, si: int = -1, context_position_ids: Any = None,
        context_mask: Any = None, m_maskgit: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        if self.disable_aln:
            valid = context_mask[..., None]
            rows = self.scale_shift_table + ((cond_BD * valid).sum(1) / valid.sum(1))[:, None]
        else:
            rows = self.ada_lin(cond_BD.max(1).values).view(-1, 6, WIDTH)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows[:, :, None].unbind(1)
        options = {"attn_bias": attn_bias, "si": si, "m_maskgit": m_maskgit, "context_mask": context_mask}
        h = self.ln_wo_grad(x) * (1 + scale1) + shift1
        x = x + self.drop_path(self.attn(h, context_position_ids=context_position_ids, **options) * gate1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + scale2) + shift2) * gate2)


class HeadNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.C = self.D = WIDTH
        self.ln_wo_grad, self.ada_lin = RMSNorm(WIDTH), nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD.max(1, keepdim=True).values).chunk(2, -1)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


class PublicHART(nn.Module):
    def __init__(self, cosine: bool = False, table: bool = False) -> None:
        super().__init__()
        self.patch_nums, self.vae_quant_proxy = PATCHES, (HybridQuantizer(),)
        self.context_embed, self.word_embed = nn.Linear(5, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(cosine, table) for _ in range(2))
        level = torch.cat([torch.zeros(TEXTS), *(torch.full((n * n,), k + 1.0) for k, n in enumerate(PATCHES[1:]))])
        mask = torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None]
        self.register_buffer("attn_bias_for_masking", mask)
        self.head_nm, self.head, self.drawn = HeadNorm(), nn.Linear(WIDTH, 32), torch.empty(0)

    def forward(
        self, context: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor, context_position_ids: torch.Tensor,
        context_mask: torch.Tensor, kept: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`kept` (B, LENGTH): which tokens are there, all but some of the last scale."""
        condition = self.context_embed(context)
        x = torch.cat([condition, self.word_embed(x_BLCv_wo_first_l)], 1)
        x = x[kept.nonzero(as_tuple=True)].view(len(x), -1, WIDTH)
        chosen, mask = (
            kept[:, TEXTS:].nonzero(as_tuple=True),
            self.attn_bias_for_masking[..., : x.shape[1], : x.shape[1]],
        )
        for block in self.blocks:
            x = block(
                x=x, cond_BD=condition, attn_bias=mask.to(x.dtype), m_maskgit=chosen,
                context_position_ids=context_position_ids, context_mask=context_mask,
            )  # fmt: skip
        logits = wide(self.head(self.head_nm(wide(x), condition)))[:, TEXTS - 1 :]
        self.drawn = sample_with_top_k_top_p_(logits.detach().clone(), top_k=1)
        return logits

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, label_B: torch.Tensor, context_position_ids: torch.Tensor, context_mask: torch.Tensor, g_seed: int = 0,
        top_k: int = 0, top_p: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rng, (quantizer,) = torch.Generator().manual_seed(g_seed), self.vae_quant_proxy
        batch, condition = len(label_B), self.context_embed(torch.cat([label_B, torch.zeros_like(label_B)]))
        texts = {"context_position_ids": context_position_ids.repeat(2, 1), "context_mask": context_mask.repeat(2, 1)}
        f_hat, drawn, last = torch.zeros(batch, 4, 4, 4), [], len(PATCHES) - 1
        for block in self.blocks:
            block.attn.kv_caching(True)
        halves = [(torch.arange(LAST) % 2 == half).expand(2 * batch, -1).nonzero(as_tuple=True) for half in (0, 1)]
        found, following = torch.zeros(batch, LAST, 4), condition
        for step, chosen in enumerate([*[None] * last, *halves]):
            si = min(step, last)
            x = following if chosen is None else following[chosen].view(2 * batch, -1, WIDTH)
            for block in self.blocks:
                x = block(x=x, cond_BD=condition, attn_bias=None, si=si, m_maskgit=chosen, **texts)
            logits = wide(self.head(self.head_nm(wide(x), condition)))
            logits = 2 * logits[:batch] - logits[batch:]
            logits = logits[:, -1:] if si == 0 else logits
            drawn.append(sample_with_top_k_top_p_(logits, top_k, top_p, rng)[..., 0])
            codes = quantizer.embedding(drawn[-1])
            if chosen is None:
                codes = codes.mT.unflatten(2, (PATCHES[si],) * 2)
                f_hat, following = quantizer.get_next_autoregressive_input(si, last + 1, f_hat, codes, PATCHES)
                following = self.word_embed(following.view(batch, 4, -1).mT).repeat(2, 1, 1)
            else:
                found[:, step - last :: 2] = codes.to(found.dtype)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(drawn, 1), f_hat + found.mT.unflatten(2, (4, 4))
