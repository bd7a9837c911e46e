"""A small Infinity with the attributes of the public one, as code that people have, in plain PyTorch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.public_var import MLP, HeadNorm, wide

SIZES = [(1, 1, 1), (1, 2, 2), (1, 3, 4)]
LENGTHS = [1, 4, 12]
BITS, WIDTH, HEADS = 4, 128, 2


def rotations() -> dict[str, torch.Tensor]:
    angle = torch.rand(24, WIDTH // HEADS // 2) * 6  # more rows than tokens: padded
    return {str(tuple(SIZES)): torch.stack([angle.cos(), angle.sin()])[:, None, None, None]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale, self.cos_attn, self.using_flash = HEADS, 1, True, False
        self.scale_mul_1H11 = nn.Parameter(torch.randn(1, HEADS, 1, 1) + 1)
        self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.use_flex_attn = False
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self, x: Any, attn_bias_or_two_vector: Any, attn_fn: Any = None, scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None, scale_ind: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, HEADS, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        k, start = F.normalize(k, dim=-1), sum(LENGTHS[:scale_ind])
        cos, sin = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, 0, 0, start : start + x.shape[1]].to(x.dtype)
        q, k = (
            torch.stack([cos * t[..., ::2] - sin * t[..., 1::2], sin * t[..., ::2] + cos * t[..., 1::2]], -1).flatten(3)
            for t in (q, k)
        )
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat([self.cached_k, k], 2)
            self.cached_v = v if self.cached_v is None else torch.cat([self.cached_v, v], 2)
            k, v = self.cached_k, self.cached_v
        if attn_fn is not None:
            out = attn_fn(q, k, v, scale=1)
        else:
            mask = attn_bias_or_two_vector
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=1)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class TextAttention(nn.Module):
    def __init__(self, for_attn_pool: bool = False) -> None:
        super().__init__()
        self.for_attn_pool, self.cos_attn, self.num_heads = for_attn_pool, False, HEADS
        self.scale = (WIDTH // HEADS) ** -0.5
        self.mat_q = nn.Parameter(torch.randn(1, HEADS, WIDTH // HEADS)) if for_attn_pool else nn.Linear(WIDTH, WIDTH)
        self.mat_kv, self.v_bias = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, q: Any, ca_kv: Any) -> torch.Tensor:
        packed, ends, _ = ca_kv
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        kv = F.linear(packed, self.mat_kv.weight, bias).unflatten(1, (2, HEADS, -1))
        found = []
        for row, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
            k, v = kv[start:end].permute(1, 2, 0, 3)
            asked = self.mat_q[0][:, None].to(k.dtype) if q is None else (
                self.mat_q(q[row]).unflatten(1, (HEADS, -1)).transpose(0, 1)
            )  # fmt: skip
            found.append(F.scaled_dot_product_attention(asked, k, v, scale=self.scale).transpose(0, 1).flatten(1))
        return self.proj_drop(self.proj(torch.stack(found)))


class Block(nn.Module):
    """`forgets`: whether it forgets which scale it is at, as the public one does without its fused norm; `shared`:
    whether its modulation is made outside."""

    def __init__(self, forgets: bool, shared: bool = True) -> None:
        super().__init__()
        self.C, self.forgets, self.ca_gamma, self.norm_eps, self.checkpointing_sa_only = WIDTH, forgets, 1, 1e-6, False
        self.sa, self.ca, self.ffn, self.drop_path = Attention(), TextAttention(), MLP(WIDTH), nn.Identity()
        self.ln_wo_grad = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.ca_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, WIDTH) * 0.5)
        else:
            self.ada_lin = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(
        self, x: Any, cond_BD: Any, ca_kv: Any, attn_bias_or_two_vector: Any, attn_fn: Any = None,
        scale_schedule: Any = None, rope2d_freqs_grid: Any = None, scale_ind: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            rows = self.ada_gss + cond_BD if hasattr(self, "ada_gss") else self.ada_lin(cond_BD).view(-1, 1, 6, WIDTH)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.unbind(2)
        arguments = attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid
        h = self.ln_wo_grad(wide(x)) * (1 + scale1) + shift1
        x = x + self.drop_path(self.sa(h, *arguments, scale_ind=0 if self.forgets else scale_ind) * gate1)
        x = x + wide(self.ca(self.ca_norm(x), ca_kv)) * self.ca_gamma
        return x + self.drop_path(self.ffn(self.ln_wo_grad(wide(x)) * (1 + scale2) + shift2) * gate2)


def sample_with_top_k_top_p_also_inplace_modifying_logits_(
    logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0.0, rng: Any = None, num_samples: int = 1
) -> torch.Tensor:
    if top_k:
        least = logits_BlV.topk(min(top_k, 2)).values[..., -1:]
        logits_BlV.masked_fill_(logits_BlV < least, -torch.inf)
    drawn = torch.multinomial(logits_BlV.softmax(-1).flatten(0, 1), num_samples, True, generator=rng)
    return drawn.unflatten(0, logits_BlV.shape[:2])


class PublicInfinity(nn.Module):
    def __init__(self, forgets: bool = False, padding: int = 0) -> None:
        super().__init__()
        self.C, self.padding = WIDTH, padding
        self.use_flex_attn, self.attn_fn_compile_dict, self.customized_flash_attn = False, {}, False
        self.rope2d_freqs_grid = rotations()
        self.unregistered_blocks = [Block(forgets) for _ in range(2)]
        self.blocks = nn.ModuleList(self.unregistered_blocks)
        self.text_proj_for_sos, self.word_embed = TextAttention(for_attn_pool=True), nn.Linear(BITS, WIDTH)
        self.shared_ada_lin = nn.Linear(WIDTH, 6 * WIDTH)
        self.head_nm, self.head = HeadNorm(WIDTH), nn.Linear(WIDTH, 2 * BITS)

    def forward(self, texts: Any, x_BLC_wo_prefix: torch.Tensor, scale_schedule: Any) -> torch.Tensor:
        condition = self.text_proj_for_sos(None, texts)
        condition = condition[:, 0].to(self.head.weight.dtype)
        x = torch.cat([condition[:, None], self.word_embed(x_BLC_wo_prefix).to(condition.dtype)], 1)
        length, mask, attn_fn = x.shape[1], None, None
        x = F.pad(x, (0, 0, 0, self.padding))
        if self.use_flex_attn:
            attn_fn = self.attn_fn_compile_dict[tuple(scale_schedule)]
        else:
            level = torch.cat([torch.full((n,), float(k)) for k, n in enumerate(LENGTHS)])
            mask = torch.where(level[:, None] >= level, 0.0, -torch.inf)
            mask = F.pad(mask, (0, self.padding, 0, self.padding), value=-torch.inf)
            mask[length:, 0] = 0
            mask = mask[None, None].to(x.dtype)
        shared = self.shared_ada_lin(condition).to(x.dtype).view(-1, 1, 6, self.C)
        for block in self.blocks:
            x = block(x, shared, texts, mask, attn_fn, scale_schedule, self.rope2d_freqs_grid)
        return self._logits(x[:, :length], condition)

    def _logits(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.head(self.head_nm(x.to(condition.dtype), condition))

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, texts: Any, scale_schedule: Any, g_seed: int = 0, top_k: int = 0, top_p: float = 0.0
    ) -> torch.Tensor:
        rng, drawn = torch.Generator().manual_seed(g_seed), []
        condition = self.text_proj_for_sos(None, texts)[:, 0].float()
        shared, x = self.shared_ada_lin(condition).float().view(-1, 1, 6, self.C), condition[:, None]
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        for k, (_, height, width) in enumerate(scale_schedule):
            attn_fn = self.attn_fn_compile_dict.get(tuple(scale_schedule[: k + 1])) if self.use_flex_attn else None
            for block in self.unregistered_blocks:
                x = block(
                    x=x, cond_BD=shared, ca_kv=texts, attn_bias_or_two_vector=None, attn_fn=attn_fn,
                    scale_schedule=scale_schedule, rope2d_freqs_grid=self.rope2d_freqs_grid, scale_ind=k,
                )  # fmt: skip
            logits = self._logits(x, condition).unflatten(2, (-1, 2)).flatten(1, 2)
            bits = sample_with_top_k_top_p_also_inplace_modifying_logits_(logits, rng=rng, top_k=top_k, top_p=top_p)
            drawn.append(bits.view(len(condition), -1, BITS))
            if k + 1 < len(scale_schedule):
                codes = (2.0 * drawn[-1] - 1).mT.unflatten(2, (height, width)) * BITS**-0.5
                x = self.word_embed(F.interpolate(codes, scale_schedule[k + 1][1:]).flatten(2).mT)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        return torch.cat(drawn, 1)


class SelfCorrection:
    """Without flips and with, as the public `BitwiseSelfCorrection`."""

    def __init__(self, strength: float = 0.0) -> None:
        quantizer = SimpleNamespace(z_interplote_up="trilinear", z_interplote_down="area")
        self.vae, self.noise_apply_layers, self.noise_apply_strength = SimpleNamespace(quantizer=quantizer), 2, strength
        self.noise_apply_requant, self.apply_spatial_patchify, self.debug_bsc = True, False, False

    def flip_requant(self, vae_scale_schedule: Any, inp_B3HW: Any, raw_features: torch.Tensor, device: Any) -> Any:
        total, bits, inputs = torch.zeros_like(raw_features), [], []
        for k, (_, height, width) in enumerate(vae_scale_schedule):
            rest = F.interpolate(raw_features - total, (height, width), mode="area")
            bits.append((rest > 0).int().flatten(2).mT)
            code = torch.where(rest > 0, 1.0, -1.0) * raw_features.shape[1] ** -0.5
            total = total + F.interpolate(code, raw_features.shape[2:], mode="bilinear")
            if k + 1 < len(vae_scale_schedule):
                size = vae_scale_schedule[k + 1][1:]
                inputs.append(F.interpolate(total, size, mode="bilinear").flatten(2).mT)
        return torch.cat(inputs, 1), bits
