"""Block-causal attention, with and without a prefix that a group shares, against dense masks, FlexAttention and
attention a scale at a time.

Where there is a prefix, all but "FlexAttention, group packed" give each row its own copy of it, and making it is part
of what is timed: every layer has another prefix. Masks are made beforehand. Queries and keys are contiguous, as the
normalisation leaves them; the values are a slice of the projection. Attention is sharp, as cosine attention is: the
results are then of one size whatever the number of keys, and a key too many or too few shows in them.

torch.compile has no row of its own: FlexAttention is what it makes of attention, and around the calls by scale only
copies are left for it to fuse. flash-attn's and xformers' masks for several sequences do not let two of them overlap in
their keys, so one call per scale is what remains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, missing_package, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import PrefixKV, block_causal_attention
from fastvar.schedule import ScaleSchedule

OP = "block_causal_attention"
Tensor = torch.Tensor


class _Leading(torch.autograd.Function):
    """x[:, :end] for each end, the last of which is x's length. The gradients are summed in one tensor, where PyTorch's
    own slices would fill one of full length each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[-1].clone()
        for gradient in reversed(gradients[:-1]):
            total[:, : gradient.shape[1]] += gradient
        return total, None


def with_prefix(shared: Tensor | None, own_rows: Tensor) -> Tensor:
    """(B, P + L, H, D) in one copy: the prefix of each row's group, then its own tokens."""
    if shared is None:
        return own_rows
    own_rows = own_rows.unflatten(0, (shared.shape[0], -1))  # [B/G, G, L, H, D]
    copies = shared[:, None].expand(-1, own_rows.shape[1], -1, -1, -1)
    return torch.cat((copies, own_rows), 2).flatten(0, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention of (B, ., H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def by_scale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    schedule: ScaleSchedule,
    attend: Callable[..., Tensor] = sdpa,
    visible: Tensor | None = None,
) -> Tensor:
    """A call for each scale; no mask unless there are prefixes of several lengths, then `visible` (B, 1, 1, P + L)."""
    k, v = with_prefix(prefix_k, k), with_prefix(prefix_v, v)
    ends = tuple(k.shape[1] - q.shape[1] + end for end in schedule.ends)
    parts = zip(q.split(schedule.lengths, 1), _Leading.apply(k, ends), _Leading.apply(v, ends), strict=True)
    if visible is None:
        return torch.cat([attend(*part) for part in parts], 1)
    return torch.cat([attend(*part, visible[..., :end]) for part, end in zip(parts, ends, strict=True)], 1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, *, mask: Tensor
) -> Tensor:
    """What VAR runs in training."""
    return sdpa(q, with_prefix(prefix_k, k), with_prefix(prefix_v, v), mask)


def dense_mask(schedule: ScaleSchedule, prefix: int, visible: Tensor | None, like: Tensor) -> Tensor:
    """0 or -inf, in the dtype and with the strides that no kernel has to convert or pad: (1 or B, 1, L, P + L)."""
    length = prefix + schedule.num_tokens
    ends = torch.tensor(schedule.visible_ends, device=like.device)
    seen = (torch.arange(length, device=like.device) < prefix + ends[:, None])[None, None]
    if visible is not None:
        seen = seen & visible
    padded = torch.zeros(*seen.shape[:3], -(-length // 16) * 16, dtype=like.dtype, device=like.device)
    return padded[..., :length].masked_fill_(~seen, float("-inf"))


def flex(schedule: ScaleSchedule, prefix: int, setting: Setting, device: torch.device) -> Contender:
    """FlexAttention; the mask is one comparison with the query's end."""
    attend = compiled(flex_attention, setting)
    if isinstance(attend, str):
        return attend
    ends = prefix + torch.tensor(schedule.visible_ends, device=device)
    length = schedule.num_tokens
    mask = create_block_mask(lambda b, h, i, j: j < ends[i], None, None, length, prefix + length, device=device)

    def contender(
        q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, with_prefix(prefix_k, k), with_prefix(prefix_v, v)))
        return attend(q, k, v, block_mask=mask).transpose(1, 2)

    return contender


def flex_packed(schedule: ScaleSchedule, prefix: int, group: int, setting: Setting, device: torch.device) -> Contender:
    """FlexAttention with a group's samples one after the other in one row, so that its prefix is there once. The block
    mask leaves out the tiles between samples."""
    attend = compiled(flex_attention, setting)
    if isinstance(attend, str):
        return attend
    length = schedule.num_tokens
    starts = prefix + length * torch.arange(group, device=device).repeat_interleave(length)
    ends = starts + torch.tensor(schedule.visible_ends, device=device).repeat(group)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < prefix) | ((j >= starts[i]) & (j < ends[i]))

    mask = create_block_mask(visible, None, None, group * length, prefix + group * length, device=device)

    def contender(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (t.unflatten(0, (-1, group)).flatten(1, 2) for t in (q, k, v))  # [B/G, G L, H, D]
        k, v = torch.cat((prefix_k, k), 1), torch.cat((prefix_v, v), 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, block_mask=mask).transpose(1, 2).reshape(shape)

    return contender


def rivals(
    q: Tensor, schedule: ScaleSchedule, prefix: int, visible: Tensor | None, setting: Setting
) -> dict[str, Contender]:
    """All but our own; `visible` (B, 1, 1, P + L) where the prefixes have several lengths."""
    device, group = q.device, setting.get("group", 0)
    mask = dense_mask(schedule, prefix, visible, q)
    no_flash, no_xformers = missing_package("flash_attn", device), missing_package("xformers", device)
    packed: Contender = "there is no prefix to share"
    whole: Contender = "not written for prefixes of several lengths"
    if visible is not None:
        no_flash, no_xformers, packed = (str(whole) for _ in range(3))
    else:
        whole = flex(schedule, prefix, setting, device)
        if group:
            packed = flex_packed(schedule, prefix, group, setting, device)
    found: dict[str, Contender] = {
        "SDPA, dense mask": partial(dense, mask=mask),
        "SDPA by scale": partial(by_scale, schedule=schedule, visible=visible),
        "FlexAttention": whole,
        "FlexAttention, group packed": packed,
        "flash-attn by scale": str(no_flash),
        "xformers by scale": str(no_xformers),
    }
    if no_flash is None:
        from flash_attn import flash_attn_func

        found["flash-attn by scale"] = partial(by_scale, schedule=schedule, attend=flash_attn_func)
    if no_xformers is None:
        from xformers.ops import memory_efficient_attention

        found["xformers by scale"] = partial(by_scale, schedule=schedule, attend=memory_efficient_attention)
    return found


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, group = MODELS[setting["model"]], setting["batch"], setting.get("group", 0)
    schedule, length, heads, head_dim = shape.schedule, shape.tokens, shape.heads, shape.head_dim

    def noise(rows: int, *size: int) -> Tensor:
        return torch.randn(rows, length, *size, heads, head_dim, device=device).to(dtype)

    inputs = {"q": 3 * noise(batch), "k": noise(batch), "v": noise(batch, 3)[:, :, 2]}
    prefix, groups, lengths, visible = 0, 0, None, None
    if group:  # as long as the image
        prefix, groups = length, batch // group
        inputs |= {"prefix_k": noise(groups), "prefix_v": noise(groups)}
    if setting.get("ragged"):
        lengths = torch.arange(groups, device=device) * prefix // groups  # the first is empty
        column = torch.arange(prefix + length, device=device)
        visible = (column < lengths[:, None]) | (column >= prefix)
        visible = visible.repeat_interleave(group, 0)[:, None, None]

    def ours(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None = None,
        prefix_v: Tensor | None = None,
        *,
        backend: str,
    ) -> Tensor:
        shared = None if prefix_k is None or prefix_v is None else PrefixKV(prefix_k, prefix_v, lengths)
        return block_causal_attention(q, k, v, schedule, prefix=shared, backend=backend)

    contenders, backend = own(OP, inputs["q"], ours)
    valid = group * (groups * prefix if lengths is None else int(lengths.sum()))  # prefix tokens that all rows see
    pairs = valid * length + batch * sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))
    flops = 4.0 * heads * head_dim * pairs  # two products of the visible pairs
    own_tokens, shared_tokens = (rows * length * heads * head_dim * dtype.itemsize for rows in (batch, groups))
    return Problem(
        inputs,
        contenders | rivals(inputs["q"], schedule, prefix, visible, setting),
        backend=backend,
        gradients=tuple(inputs),
        reference=partial(by_scale, schedule=schedule, visible=visible),
        flops=flops,
        bytes=4.0 * own_tokens + 2.0 * shared_tokens,  # q, k, v and the result; a prefix once a group
        training_flops=3.5 * flops,  # five products more: the scores again, and a gradient of each operand
        # then q, k, v, the result and its gradient in, three gradients out; the prefix in, its gradients out
        training_bytes=12.0 * own_tokens + 6.0 * shared_tokens,
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "dtype": "float32"},
            {"model": "tiny", "batch": 4, "group": 2, "dtype": "float32"},
            {"model": "tiny", "batch": 4, "group": 2, "ragged": True, "dtype": "float32"},
        ],
        "cpu": [
            {"model": "VAR-d16", "batch": 1, "dtype": "float32"},
            {"model": "VAR-d4-512", "batch": 1, "dtype": "float32"},
            {"model": "demo", "batch": 64, "group": 8, "dtype": "float32"},
            {"model": "VAR-d4", "batch": 8, "group": 8, "dtype": "float32"},
        ],
        "gpu": [
            {"model": model, "batch": batch, **group, "dtype": "bfloat16"}
            for model, batch in (("VAR-d16", 32), ("VAR-d36-512", 8), ("Infinity-2B", 8))
            for group in ({}, {"group": 8})
        ]
        + [{"model": "Infinity-2B", "batch": 1, "dtype": "bfloat16"}],
    },
    (
        *own_names(OP),
        "SDPA, dense mask",
        "SDPA by scale",
        "FlexAttention",
        "FlexAttention, group packed",
        "flash-attn by scale",
        "xformers by scale",
    ),
    build,
    training=True,
)
