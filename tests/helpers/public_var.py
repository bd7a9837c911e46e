"""A small VAR with the attributes of the public one, as code that people have, in plain PyTorch; and a fork of it with
other names, whose blocks share their modulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PATCHES = (1, 2, 3, 4)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, cosine: bool) -> None:
        super().__init__()
        self.num_heads, self.attn_drop, self.scale = heads, 0.0, 1.0
        if cosine:
            self.scale_mul_1H11 = nn.Parameter(torch.randn(1, heads, 1, 1) + 3.8)  # some beyond the largest
            self.max_scale_mul = math.log(100)
        else:
            self.scale = 0.25 * (width // heads) ** -0.5
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        if hasattr(self, "scale_mul_1H11"):
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat([self.cached_k, k], 2)
            self.cached_v = v if self.cached_v is None else torch.cat([self.cached_v, v], 2)
            k, v = self.cached_k, self.cached_v
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))


class DropRows(nn.Module):
    """Stochastic depth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.5) * 2 if self.training else x


class Block(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, width: int, heads: int, cosine: bool, shared: bool) -> None:
        super().__init__()
        self.C = self.D = width
        self.attn, self.ffn, self.drop_path = self.attention(width, heads, cosine), MLP(width), DropRows()
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        rows = self.ada_gss + cond_BD if hasattr(self, "ada_gss") else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.unbind(2)
        h = self.attn(self.ln_wo_grad(x) * (1 + scale1) + shift1, attn_bias=attn_bias)
        x = x + self.drop_path(h * gate1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + scale2) + shift2) * gate2)


class HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.C = self.D = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


class Phi(nn.Conv2d):
    resi_ratio = 0.5

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return 0.5 * h + 0.5 * super().forward(h)


class TwoPhis(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(2))

    def __getitem__(self, share: float) -> Phi:
        return self.qresi_ls[round(share)]


class Quantizer(nn.Module):
    def __init__(self, codes: int, channels: int, using_znorm: bool = False) -> None:
        super().__init__()
        self.Cvae, self.v_patch_nums, self.using_znorm, self.prog_si = channels, PATCHES, using_znorm, -1
        self.embedding, self.quant_resi = nn.Embedding(codes, channels), TwoPhis(channels)

    def _added(self, k: int, h: torch.Tensor) -> torch.Tensor:
        last = len(self.v_patch_nums) - 1
        if k < last:
            h = F.interpolate(h, (self.v_patch_nums[-1],) * 2, mode="bicubic")
        return self.quant_resi[k / last](h)

    def f_to_idxBl_or_fhat(
        self, f_BChw: torch.Tensor, to_fhat: bool, v_patch_nums: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        rest, found = f_BChw.detach(), []
        for k, side in enumerate(v_patch_nums or self.v_patch_nums):
            z = F.interpolate(rest, (side, side), mode="area").flatten(2).mT
            z, codes = (F.normalize(t, dim=-1) for t in (z, self.embedding.weight)) if self.using_znorm else (
                z, self.embedding.weight
            )  # fmt: skip
            tokens = torch.cdist(z, codes).argmin(-1)
            h = self.embedding(tokens).mT.unflatten(2, (side, side))
            rest = rest - self._added(k, h)
            found.append(f_BChw - rest if to_fhat else tokens)
        return found

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor:
        f_hat, found = 0, []
        for k, side in enumerate(self.v_patch_nums[:-1]):
            f_hat = f_hat + self._added(k, self.embedding(gt_ms_idx_Bl[k]).mT.unflatten(2, (side, side)))
            found.append(F.interpolate(f_hat, (self.v_patch_nums[k + 1],) * 2, mode="area").flatten(2).mT)
        return torch.cat(found, 1)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: torch.Tensor, h_BChw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        f_hat.add_(self._added(si, h_BChw))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, (self.v_patch_nums[si + 1],) * 2, mode="area")


def sample_with_top_k_top_p_(
    logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0.0, rng: Any = None, num_samples: int = 1
) -> torch.Tensor:
    if top_k:
        logits_BlV.masked_fill_(logits_BlV < logits_BlV.topk(top_k).values[..., -1:], -torch.inf)
    if top_p:
        values, order = logits_BlV.sort(-1)
        drop = values.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits_BlV.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    drawn = torch.multinomial(logits_BlV.softmax(-1).flatten(0, 1), num_samples, True, generator=rng)
    return drawn.unflatten(0, logits_BlV.shape[:2])


class PublicVAR(nn.Module):
    """Shapes of its `forward` and sampler as the public code has them; it samples feature maps."""

    block: type[Block] = Block
    head_norm: type[nn.Module] = HeadNorm

    def __init__(
        self, cosine: bool = True, shared: bool = False, width: int = 16, depth: int = 2, znorm: bool = False
    ) -> None:
        super().__init__()
        self.patch_nums, self.num_classes, self.C = PATCHES, 5, width
        self.cond_drop_rate = 0.0  # 0.1 in the public one
        self.L = sum(side * side for side in PATCHES)
        self.vae_quant_proxy = (Quantizer(32, 4, znorm),)
        self.word_embed, self.class_emb = nn.Linear(4, width), nn.Embedding(6, width)
        self.pos_1LC = nn.Parameter(torch.randn(1, self.L, width))
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) if shared else nn.Identity()
        self.blocks = nn.ModuleList(self.block(width, 2, cosine, shared) for _ in range(depth))
        level = torch.cat([torch.full((side * side,), float(k)) for k, side in enumerate(PATCHES)])
        mask = torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None]
        self.register_buffer("attn_bias_for_masking", mask)
        self.head_nm, self.head = self.head_norm(width), nn.Linear(width, 32)

    def _modulation(self, condition: torch.Tensor) -> torch.Tensor:
        found = self.shared_ada_lin(condition)
        return found.view(-1, 1, 6, self.C) if found.shape[-1] > self.C else found

    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor) -> torch.Tensor:
        dropped = torch.rand(len(label_B), device=label_B.device) < self.cond_drop_rate  # in evaluation mode too
        condition = self.class_emb(torch.where(dropped, self.num_classes, label_B))
        x = torch.cat([condition[:, None], self.word_embed(x_BLCv_wo_first_l)], 1)
        x = x + self.pos_1LC[:, : x.shape[1]]
        half = torch.matmul(x.new_ones(2, 2), x.new_ones(2, 2)).dtype
        mask = self.attn_bias_for_masking[:, :, : x.shape[1], : x.shape[1]].to(half)
        x, modulation = x.to(half), self._modulation(condition).to(half)
        for block in self.blocks:
            x = block(x=x, cond_BD=modulation, attn_bias=mask)
        return wide(self.head(self.head_nm(wide(x), condition)))

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, label_B: torch.Tensor, g_seed: int = 0, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rng = torch.Generator().manual_seed(g_seed)
        batch, (quantizer,) = len(label_B), self.vae_quant_proxy
        condition = self.class_emb(torch.cat([label_B, torch.full_like(label_B, self.num_classes)]))
        x, f_hat, start, drawn = condition[:, None], torch.zeros(batch, 4, 4, 4), 0, []
        for block in self.blocks:
            block.attn.kv_caching(True)
        for k, side in enumerate(self.patch_nums):
            x = x + self.pos_1LC[:, start : start + side * side]
            start += side * side
            modulation = self._modulation(condition)
            for block in self.blocks:
                x = block(x=x, cond_BD=modulation, attn_bias=None)
            t, logits = cfg * k / 3, wide(self.head(self.head_nm(wide(x), condition)))
            logits = (1 + t) * logits[:batch] - t * logits[batch:]
            drawn.append(sample_with_top_k_top_p_(logits, rng=rng, top_k=top_k, top_p=top_p)[..., 0])
            codes = quantizer.embedding(drawn[-1])
            if more_smooth:
                codes = logits.softmax(-1) @ quantizer.embedding.weight
            codes = codes.mT.unflatten(2, (side, side))
            f_hat, x = quantizer.get_next_autoregressive_input(k, 4, f_hat, codes)
            if k < 3:
                x = self.word_embed(x.view(batch, 4, -1).mT).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(drawn, 1), f_hat


class KitchenAttention(Attention):
    pass


class KitchenLayer(Block):
    attention = KitchenAttention


class KitchenNorm(HeadNorm):
    """A fork's, which takes more than the public one."""

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor, *tone: float) -> torch.Tensor:
        return super().forward(x_BLC, cond_BD) + sum(tone)


class Kitchen(PublicVAR):
    """A fork of a VAR: other names, no normalisation of queries and keys, one modulation for all blocks."""

    block, head_norm = KitchenLayer, KitchenNorm

    def __init__(self) -> None:
        super().__init__(cosine=False, shared=True)
