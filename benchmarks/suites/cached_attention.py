"""Attention of one scale's queries to all that was sampled before, against PyTorch's and flash-attn's on a cache.

What a group shares (the prefix) and what forks share (the trunk) the rivals read from a copy for each row, made
beforehand; "SDPA, parts merged" reads it once. The new keys and values are in the cache already, but for "torch.cat,
SDPA", which is what VAR does at every scale and layer: there a copy makes the cache. The suite qk_norm_rope_into_cache
is where a preallocated cache is written. Attention is sharp, as in block_causal_attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import missing_package, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import PrefixKV, cached_attention

OP = "cached_attention"
Tensor = torch.Tensor


def everything(k: Tensor, v: Tensor, prefix: PrefixKV | None, trunk: PrefixKV | None) -> tuple[Tensor, Tensor]:
    """Each row's keys and values from the first to the last (B, H, N, D), contiguous."""
    copies = []
    for name, own_part in (("k", k), ("v", v)):
        shared = [getattr(part, name) for part in (prefix, trunk) if part is not None]
        parts = [part.repeat_interleave(k.shape[0] // part.shape[0], 0) for part in shared]
        copies.append(torch.cat([*parts, own_part], 1).transpose(1, 2).contiguous())
    return copies[0], copies[1]


def mask_of(lengths: Tensor | None, batch: int, prefix: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Where prefixes have several lengths: 0 or -inf (B, 1, 1, length)."""
    if lengths is None:
        return None
    column = torch.arange(length, device=lengths.device)
    seen = (column < lengths[:, None]) | (column >= prefix)
    seen = seen.repeat_interleave(batch // len(lengths), 0)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None, None]


def reference(q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV | None = None, trunk: PrefixKV | None = None) -> Tensor:
    """softmax(q k^T) v over a copy of everything, in any dtype."""
    keys, values = everything(k, v, prefix, trunk)
    lengths = None if prefix is None else prefix.lengths
    mask = mask_of(lengths, len(q), 0 if prefix is None else prefix.k.shape[1], keys.shape[2], q.dtype)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention of (B, H, ., D), and the logarithm of the softmax's sum (B, H, n) in float32."""
    aten = torch.ops.aten
    if q.device.type == "cuda":
        return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def merged(q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV | None = None, trunk: PrefixKV | None = None) -> Tensor:
    """A call for each part, the queries of the rows that share it in one row; then the parts' weighted mean."""
    outs, sums = [], []
    for part in (prefix, trunk, PrefixKV(k, v)):
        if part is None:
            continue
        together = q.unflatten(0, (part.k.shape[0], -1)).flatten(1, 2)  # [B/G, G n, H, D]
        out, lse = attention_and_lse(*(t.transpose(1, 2) for t in (together, part.k, part.v)))
        outs.append(out.transpose(1, 2).reshape(q.shape))
        sums.append(lse.transpose(1, 2).reshape(*q.shape[:3], 1))
    weights = torch.stack(sums).softmax(0).unbind()
    total = outs[0] * weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total = torch.addcmul(total, out, weight)
    return total.to(q.dtype)


def rivals(inputs: dict[str, Any]) -> dict[str, Contender]:
    """All but our own."""
    q, k, v, prefix, trunk = (inputs[name] for name in ("q", "k", "v", "prefix", "trunk"))
    shared = prefix is not None or trunk is not None
    lengths = None if prefix is None else prefix.lengths
    keys, values = everything(k, v, prefix, trunk) if shared else (k.transpose(1, 2), v.transpose(1, 2))
    mask = mask_of(lengths, len(q), 0 if prefix is None else prefix.k.shape[1], keys.shape[2], q.dtype)
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
    start = keys.shape[2] - q.shape[1]
    past = [t[:, :, :start].contiguous() for t in (keys, values)]
    new = [t[:, :, start:].contiguous() for t in (keys, values)]

    def sdpa(q: Tensor, **_: Any) -> Tensor:
        return attend(q.transpose(1, 2), keys, values).transpose(1, 2)

    def concatenated(q: Tensor, **_: Any) -> Tensor:
        parts = new  # at the first scale VAR has nothing to add to
        if start:
            parts = [torch.cat((before, after), 2) for before, after in zip(past, new, strict=True)]
        return attend(q.transpose(1, 2), *parts).transpose(1, 2)

    no_flash = missing_package("flash_attn", q.device)
    if lengths is not None:
        no_flash = "takes no mask"
    found: dict[str, Contender] = {
        "SDPA": sdpa,
        "torch.cat, SDPA": concatenated,
        "SDPA, parts merged": "takes no mask" if lengths is not None else merged if shared else "nothing is shared",
        "flash-attn": str(no_flash),
    }
    if no_flash is None:
        from flash_attn import flash_attn_with_kvcache

        filled = torch.full((len(q),), keys.shape[2], dtype=torch.int32, device=q.device)

        def flash(q: Tensor, **_: Any) -> Tensor:
            return flash_attn_with_kvcache(q, keys.transpose(1, 2), values.transpose(1, 2), cache_seqlens=filled)

        found["flash-attn"] = flash
    return found


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, scale = MODELS[setting["model"]], setting["batch"], setting["scale"]
    group, forks, schedule = setting.get("group", 0), setting.get("forks", 0), shape.schedule

    def cache(rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, capacity, H, D); in memory a head's rows lie together, as in our cache."""
        size = (2, rows, shape.heads, capacity, shape.head_dim)
        keys, values = torch.randn(size, device=device).to(dtype).transpose(2, 3)
        return keys, values

    new, tokens, before = schedule.lengths[scale - 1], schedule.ends[scale - 1], 0
    prefix = trunk = None
    if group:  # as long as a whole image
        lengths = None
        if setting.get("ragged"):
            lengths = torch.arange(batch // group, device=device) * shape.tokens // (batch // group)
        prefix = PrefixKV(*cache(batch // group, shape.tokens), lengths)
    if forks:  # from the state after half of the scales
        before = schedule.ends[len(schedule) // 2 - 1]
        trunk = PrefixKV(*cache(batch // forks, before))
    k, v = (t[:, : tokens - before] for t in cache(batch, shape.tokens - before))
    q = 3 * torch.randn(batch, new, shape.heads, shape.head_dim, device=device).to(dtype)
    inputs = {"q": q, "k": k, "v": v, "prefix": prefix, "trunk": trunk}
    contenders, backend = own(OP, q, cached_attention)
    parts = [part for part in (prefix, trunk, PrefixKV(k, v)) if part is not None]
    pairs = new * sum(
        batch * part.k.shape[1] if part.lengths is None else group * int(part.lengths.sum()) for part in parts
    )
    return Problem(
        inputs,
        contenders | rivals(inputs),
        backend=backend,
        reference=reference,
        flops=4.0 * shape.width * pairs,  # two products of the visible pairs
        # queries, the result, and what is shared once for those that share it
        bytes=dtype.itemsize * (2.0 * q.numel() + sum(2.0 * part.k.numel() for part in parts)),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "scale": 1, "batch": 2, "dtype": "float32"},
            {"model": "tiny", "scale": 3, "batch": 4, "group": 2, "forks": 2, "dtype": "float32"},
            {"model": "tiny", "scale": 3, "batch": 4, "group": 2, "ragged": True, "dtype": "float32"},
        ],
        "cpu": [
            {"model": "VAR-d16", "scale": 2, "batch": 2, "dtype": "float32"},
            {"model": "VAR-d16", "scale": 10, "batch": 2, "dtype": "float32"},
            {"model": "VAR-d16", "scale": 10, "batch": 4, "group": 4, "forks": 2, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "scale": 1, "batch": 2, "dtype": "bfloat16"},
            {"model": "VAR-d16", "scale": 10, "batch": 16, "dtype": "bfloat16"},
            {"model": "VAR-d30", "scale": 10, "batch": 128, "dtype": "bfloat16"},
            {"model": "VAR-d30", "scale": 2, "batch": 128, "group": 16, "dtype": "bfloat16"},
            {"model": "VAR-d30", "scale": 10, "batch": 128, "group": 16, "forks": 2, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "scale": 13, "batch": 2, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "scale": 2, "batch": 16, "group": 16, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "scale": 13, "batch": 16, "group": 16, "dtype": "bfloat16"},
        ],
    },
    (*own_names(OP), "SDPA", "torch.cat, SDPA", "SDPA, parts merged", "flash-attn"),
    build,
)
