"""A transformer block of a next-scale model, and what its tokens attend to in training and in sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.kv_cache import KVCache, first_tokens
from fastvar.models.linear import Linear
from fastvar.models.text import TextKV
from fastvar.models.var_config import VARConfig
from fastvar.ops import (
    PrefixKV,
    adaptive_layer_norm,
    block_causal_attention,
    block_causal_attention_with_lse,
    cached_attention,
    gated_residual,
    gated_residual_norm,
    qk_norm_rope,
    qk_norm_rope_into_cache,
)
from fastvar.schedule import ScaleSchedule

Rope = tuple[torch.Tensor, torch.Tensor]  # tables of angles, see `fastvar.ops.rope_tables`


class Modulations(NamedTuple):
    """What the blocks are told of one stream's condition; it does not change over scales.

    Attributes:
        blocks: per block (B, 6, C) in the order gate1, gate2, scale1, scale2, shift1, shift2; more rows where a block
            has more norms.
        biases: per block (3 C,), the bias of queries, keys and values; it belongs to no sample, but is put together as
            seldom.
        head: (B, 2, C), scale and shift before the head.
        texts: per block what its tokens see of their texts; empty for blocks that see none.
    """

    blocks: list[torch.Tensor]
    biases: list[torch.Tensor]
    head: torch.Tensor
    texts: Sequence[TextKV] = ()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Modulations:
        """Those of `function` of each sample's tensors; the biases are the same."""
        return Modulations(
            [function(block) for block in self.blocks],
            self.biases,
            function(self.head),
            [text.map(function) for text in self.texts],
        )

    def by_block(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, TextKV | None]]:
        """Modulation, bias and text of each block."""
        texts: Sequence[TextKV | None] = self.texts or [None] * len(self.blocks)
        return zip(self.blocks, self.biases, texts, strict=True)

    def gates_and_norms(self) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]:
        """Each block's last gate (B, C), and scale and shift (B, C) of the norm that each block begins with and of the
        head's."""
        rows = [block.unbind(1) for block in self.blocks]
        norms = [(scale, shift) for _, _, scale, _, shift, *_ in rows]
        return [row[1] for row in rows], [*norms, self.head.unbind(1)]


class Block(nn.Module):
    """Attention and MLP with adaptive layer norm. It normalises, projects and mixes; who attends to what is the
    caller's affair: `attend` gets the queries, keys and values (B, L, H, D) and answers (B, L, H, D)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width, self.heads, self.eps, self.drop_path = config.embed_dim, config.num_heads, config.norm_eps, drop_path
        hidden = round(width * config.mlp_ratio)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(4.0))) if config.qk_l2_norm else None
        self.softmax_scale = 1.0 if config.qk_l2_norm else 0.25 / math.sqrt(config.head_dim)
        self.proj = Linear(width, width)
        self.mlp_in = Linear(width, hidden)
        self.mlp_out = Linear(hidden, width)
        if config.shared_adaln:
            self.modulation_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        else:
            self.modulation = Linear(width, 6 * width)

    def modulate(self, activated: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 6, C) from the activated condition (B, C) or from the modulation shared by all blocks (B, 6, C), and the
        projection's bias (3 C,)."""
        bias = self.qkv_bias()
        if shared is not None:
            return self.modulation_table + shared, bias
        return self.modulation(activated).unflatten(1, (6, -1)), bias

    def qkv_bias(self) -> torch.Tensor:
        """(3 C,), in autocast's dtype if it is on."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        device = bias.device.type
        return bias.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else bias

    def project(
        self, h: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (B, L, H, D), not yet normalised; bias: `qkv_bias()`, if it was made before."""
        bias = self.qkv_bias() if bias is None else bias
        q, k, v = self.qkv(h, bias=bias).unflatten(2, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def normalise(
        self, q: torch.Tensor, k: torch.Tensor, rope: Rope | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.log_scale is None and rope is None:
            return q, k
        return qk_norm_rope(q, k, log_scale=self.log_scale, rope=rope)

    def keys_and_values(
        self, x: torch.Tensor, modulation: torch.Tensor, bias: torch.Tensor, rope: Rope | None = None
    ) -> PrefixKV:
        """What other streams see of this block's input (B, L, C)."""
        _, _, scale, _, shift, *_ = modulation.unbind(1)
        q, k, v = self.project(adaptive_layer_norm(x, scale, shift, eps=self.eps), bias)
        return PrefixKV(self.normalise(q, k, rope)[1], v)

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        attend: Attend,
        bias: torch.Tensor | None = None,
        text: TextKV | None = None,
    ) -> torch.Tensor:
        """(B, L, C) to (B, L, C); bias: `qkv_bias()`, if it was made before; text: of a block that reads one."""
        _, gate, scale, _, shift, *_ = modulation.unbind(1)
        x, h = self.mix(x, adaptive_layer_norm(x, scale, shift, eps=self.eps), modulation, attend, bias, text)
        return gated_residual(x, h, gate)

    def mix(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        modulation: torch.Tensor,
        attend: Attend,
        bias: torch.Tensor | None = None,
        text: TextKV | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block makes of its input x and its first norm h, both (B, L, C): x after attention and what the MLP
        adds to it, before its gate. So the gate can be applied together with the norm that comes next."""
        gate, _, _, scale, _, shift = modulation.unbind(1)
        h = self.proj(attend(self, *self.project(h, bias)).flatten(2))
        x, h = gated_residual_norm(x, self._dropped(h), gate, scale, shift, eps=self.eps)
        return x, self._mlp(h)

    def _mlp(self, h: torch.Tensor) -> torch.Tensor:
        if type(self.mlp_in) is Linear:  # noqa: SIM108
            h = self.mlp_in(h, gelu=True)
        else:  # wrapped, as by LoRA: what is added to the projection must pass the GELU too
            h = F.gelu(self.mlp_in(h), approximate="tanh")
        return self._dropped(self.mlp_out(h))

    def _dropped(self, h: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return h
        keep = 1 - self.drop_path
        return h * (torch.rand(h.shape[0], 1, 1, device=h.device) < keep).to(h.dtype).div(keep)


Attend = Callable[[Block, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend_to_scales(
    schedule: ScaleSchedule,
    prefix: PrefixKV | None = None,
    seen: list[PrefixKV] | None = None,
    rope: Rope | None = None,
    *,
    by_scale: bool = False,
) -> Attend:
    """Teacher forcing: every scale at once. `seen` gets the keys and values; `rope`: the tables of these scales;
    `by_scale`: whether scale k sees the prefix's scales up to k alone."""

    def attend(block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = block.normalise(q, k, rope)
        if seen is not None:
            seen.append(PrefixKV(k, v))
        return _after_prefix(q, k, v, schedule, prefix, block.softmax_scale, by_scale)

    return attend


def attend_in_two_streams(
    schedule: ScaleSchedule,
    subject_schedule: ScaleSchedule,
    rows: int,
    lengths: torch.Tensor | None,
    *,
    by_scale: bool = False,
) -> Attend:
    """Teacher forcing of two streams in one: the first `rows` rows are subjects, which see themselves; the others are
    images, groups of which see a subject too, `lengths` of its tokens, and `by_scale` the scales up to their own."""

    def attend(block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = block.normalise(q, k)
        # split, as the gradient of slices would be a tensor of full size for each
        (subject_q, q), (subject_k, k), (subject_v, v) = (t.split([rows, len(t) - rows]) for t in (q, k, v))
        scale, prefix = block.softmax_scale, PrefixKV(subject_k, subject_v, lengths)
        subject = block_causal_attention(subject_q, *prefix[:2], subject_schedule, softmax_scale=scale)
        images = _after_prefix(q, k, v, schedule, prefix, scale, by_scale)
        return torch.cat([subject, images])

    return attend


def _after_prefix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    prefix: PrefixKV | None,
    softmax_scale: float,
    by_scale: bool,
) -> torch.Tensor:
    """Block-causal attention (B, L, H, D) of images after the prefix of their groups, of which they see all.

    `by_scale`: an image's scale k sees the prefix's scales up to k, those of the same schedule. Then attention to the
    prefix is block-causal itself: a call of its own, merged with the first by log-sum-exp. That call takes keys and
    values for each row, so that those of several subjects are copied for their groups.
    """
    if prefix is None or not by_scale:
        return block_causal_attention(q, k, v, schedule, prefix=prefix, softmax_scale=softmax_scale)
    group = len(q) // max(len(prefix.k), 1)
    keys, values = (
        t[:, None, : schedule.num_tokens].expand(-1, group, -1, -1, -1).flatten(0, 1) for t in (prefix.k, prefix.v)
    )
    own, own_sum = block_causal_attention_with_lse(q, k, v, schedule, softmax_scale=softmax_scale)
    other, other_sum = block_causal_attention_with_lse(q, keys, values, schedule, softmax_scale=softmax_scale)
    if prefix.lengths is not None:  # all of a subject's tokens, or none
        dropped = (prefix.lengths == 0).repeat_interleave(group, output_size=len(q))
        other_sum = other_sum.masked_fill(dropped[:, None, None], -torch.inf)
    share = (other_sum - own_sum).sigmoid().mT[..., None]  # [B, L, H, 1]
    return torch.lerp(own.to(share.dtype), other.to(share.dtype), share).to(own.dtype)


def attend_to_cache(
    cache: KVCache,
    layer: int,
    rows: int,
    position: int,
    end: int,
    rope: Rope | None = None,
    prefix_tokens: int | None = None,
) -> Attend:
    """Sampling: the scale whose tokens go to rows position : end of the cache, of its first `rows` samples; it sees the
    first `prefix_tokens` of the prefix, or all."""
    keys, values, prefix, trunk = cache.layer(layer, rows)
    if prefix is not None and prefix_tokens is not None:
        prefix = first_tokens(prefix, prefix_tokens)

    def attend(block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = qk_norm_rope_into_cache(q, k, v, keys, values, position, log_scale=block.log_scale, rope=rope)
        return cached_attention(
            q, keys[:, :end], values[:, :end], prefix=prefix, trunk=trunk, softmax_scale=block.softmax_scale
        )

    return attend
