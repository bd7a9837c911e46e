"""The public Infinity (FoundationVision/Infinity) and forks of it that kept the names of its attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvar.integrations.attention import padded
from fastvar.integrations.corrected import corrected
from fastvar.integrations.patching import Applied, Left, Patch, Replaced, own
from fastvar.integrations.var import (
    Tables,
    attend_to_cache,
    attend_to_scales,
    attention_obstacle,
    filled,
    further_parts,
    log_scale,
    masked,
    norm_obstacle,
    queries_keys_values,
    samples,
)
from fastvar.ops import (
    adaptive_layer_norm,
    bitwise_residual_quantize,
    block_causal_attention,
    gated_residual,
    gated_residual_norm,
)
from fastvar.schedule import ScaleSchedule


def grids(scale_schedule: Any) -> ScaleSchedule | None:
    """The schedule of sizes (t, h, w), None for videos."""
    return (
        None if scale_schedule is None else _grids(tuple(tuple(int(side) for side in size) for size in scale_schedule))
    )


@lru_cache(maxsize=256)
def _grids(sizes: tuple[tuple[int, ...], ...]) -> ScaleSchedule | None:
    if any(len(size) != 3 or size[0] != 1 for size in sizes):
        return None
    try:
        return ScaleSchedule([size[1:] for size in sizes])
    except ValueError:
        return None


# -- loss --------------------------------------------------------------------------------------------------------------


_WRONG, _RIGHT = "scale_schedule[-1].prod()", "np.prod(scale_schedule[-1])"


def mend_the_loss(applied: Applied, place: str, trainer: Any) -> None:
    """Let a trainer weigh the losses of scales: some versions ask a tuple, the size of the last scale, for `prod`."""
    function = getattr(getattr(trainer, "train_step", None), "__func__", None)
    if not hasattr(trainer, "reweight_loss_by_scale") or function is None:
        return
    kind, made = type(trainer).__name__, corrected(function, _WRONG, _RIGHT)
    if made is None:
        why = (
            "its train_step cannot be made anew of its text; if reweight_loss_by_scale stops at a tuple without prod, "
            f"change that line to {_RIGHT}"
        )
        applied.left.append(Left("loss", place, kind, why))
    elif made is not function:
        applied.set(trainer, "train_step", MethodType(made, trainer))
        note = "reweight_loss_by_scale works, where the public code stops with an error"
        applied.replaced.append(Replaced("loss", place, kind, "the weights of scales are computed of a tuple", note))


def loss_weights(scale_schedule: Sequence[Sequence[int]]) -> torch.Tensor:
    """What `reweight_loss_by_scale` weighs tokens with, (L,) float32: in inverse proportion to the side of their grid,
    with a sum of 1. Some versions of the public trainer stop with an error where they compute it."""
    areas = torch.tensor(scale_schedule).prod(1)
    weights = areas.double().rsqrt().repeat_interleave(areas)
    return (weights / weights.sum()).float()


# -- attention ---------------------------------------------------------------------------------------------------------


def tables(rotations: Any, scale_schedule: Any, start: int, end: int, device: torch.device) -> Tables | None:
    """cos and sin (n, D/2) of tokens start : end, of the public model's dictionary."""
    if rotations is None:
        return None
    key = str(tuple(scale_schedule))
    rotations[key] = rotations[key].to(device)  # as the public code does: once
    cos, sin = rotations[key][:, 0, 0, 0, start:end]
    return cos, sin


class SelfAttention:
    """Methods of Infinity's attention. In sampling the cache says where tokens are, so that a missing `scale_ind` does
    no harm."""

    def forward(
        self: Any,
        x: torch.Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Any = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None,
        scale_ind: int = 0,
    ) -> torch.Tensor:
        known, tokens, mask = own(self), x.shape[1], attn_bias_or_two_vector
        schedule = grids(scale_schedule)
        if samples(self, mask is None):
            start = filled(self)
            rope = tables(rope2d_freqs_grid, scale_schedule, start, start + tokens, x.device)
            capacity = tokens if schedule is None else schedule.num_tokens
            out = attend_to_cache(self, *queries_keys_values(self, x), capacity, log_scale(self), rope)
            return self.proj_drop(self.proj(out.flatten(2)))
        ours = mask is None and isinstance(attn_fn, partial) and attn_fn.func is _heads_first
        diagonal = False if ours else masked(known, mask, schedule, tokens)
        if self.caching or schedule is None or diagonal is None or schedule.num_tokens > tokens:
            arguments = mask, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
            return known.former["forward"](x, *arguments)
        length = schedule.num_tokens
        rope = tables(rope2d_freqs_grid, scale_schedule, 0, length, x.device)
        q, k, v = queries_keys_values(self, x[:, :length])
        out = attend_to_scales(self, q, k, v, schedule, rope, diagonal).flatten(2)
        if tokens > length:  # padding, which nobody looks at
            out = F.pad(out, (0, 0, 0, tokens - length))
        return self.proj_drop(self.proj(out))


def own_attention_obstacle(attention: Any) -> str | None:
    if attention.using_flash:
        return "it calls a flash-attn of its own, which masks by arguments"
    return attention_obstacle(attention)


class AnySchedule(dict[Any, Callable[..., torch.Tensor]]):
    """In place of the compiled attentions of some schedules: one for any, made when it is asked for."""

    def __missing__(self, scale_schedule: Any) -> Callable[..., torch.Tensor]:
        schedule = grids(scale_schedule)
        if schedule is None:
            raise ValueError(f"integrations: scale_schedule: expected grids of images, got {scale_schedule}")
        self[scale_schedule] = partial(_heads_first, schedule)
        return self[scale_schedule]

    def get(self, scale_schedule: Any, default: Any = None) -> Any:
        return default if grids(scale_schedule) is None else self[scale_schedule]


@contextmanager
def constructing(kind: type) -> Iterator[None]:
    """While it lasts, models of a class that are made with `use_flex_attn` attend by schedule, on any device, in
    training and in sampling, for which the public constructor asks for a mask of a type that is not there.

    Args:
        kind: the public `Infinity`, or a fork's.
    """
    former = kind.compile_flex_attn  # type: ignore[attr-defined]
    kind.compile_flex_attn = lambda self: AnySchedule()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        kind.compile_flex_attn = former  # type: ignore[attr-defined]


def _heads_first(
    schedule: ScaleSchedule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """(B, H, L', D) each; what follows the schedule's tokens is padding. Fewer queries than keys, a scale's to a cache,
    see all of them."""
    if q.shape[2] < k.shape[2]:
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=scale)
    length = schedule.num_tokens
    q, k, v = (t.to(v.dtype).transpose(1, 2)[:, :length] for t in (q, k, v))
    out = block_causal_attention(q, k, v, schedule, softmax_scale=scale).transpose(1, 2)
    return F.pad(out, (0, 0, 0, v.shape[1] - length))


def leave_out_the_mask(applied: Applied, place: str, model: Any) -> None:
    """Have an Infinity ask for attention by schedule, as it does for FlexAttention, so that it makes no dense mask."""
    if not all(hasattr(model, name) for name in ("use_flex_attn", "attn_fn_compile_dict", "rope2d_freqs_grid", "C")):
        return
    blocks = [each for each in model.modules() if hasattr(each, "mat_qkv")]
    why = None
    if not blocks or not all(hasattr(each, "_fastvar") and "forward" in own(each).former for each in blocks):
        why = "some of its attention is left as it is, which needs the mask"
    elif getattr(model, "customized_flash_attn", False):
        why = "it calls a flash-attn of its own"
    elif model.C % 128:
        why = f"without the mask it wants a width that is a multiple of 128, it has {model.C}"
    kind = type(model).__name__
    if why is not None:
        applied.left.append(Left("attention", place, kind, f"it makes a dense mask, which is not read: {why}"))
        return
    applied.set(model, "use_flex_attn", True)
    applied.set(model, "attn_fn_compile_dict", AnySchedule())
    note = "attention by schedule works for any schedule and in sampling, whatever use_flex_attn was"
    applied.replaced.append(Replaced("attention", place, kind, "no dense mask is made", note))


# -- texts -------------------------------------------------------------------------------------------------------------


class CrossAttention:
    """Methods of the attention to texts."""

    def forward(self: Any, q: torch.Tensor | None, ca_kv: tuple[torch.Tensor, torch.Tensor, int]) -> torch.Tensor:
        packed, ends, longest = ca_kv

        def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            bias = torch.cat((self.zero_k_bias, self.v_bias))
            rows, _, valid = padded(F.linear(packed, self.mat_kv.weight, bias), ends, longest)
            k, v = rows.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return k, v, None if valid is None else valid[:, None, None]

        k, v, mask = own(self).run.once(self, make, packed)
        if q is None:  # the pool of a text, whose query is learned
            queries = self.mat_q.to(k.dtype).expand(len(k), -1, -1)[:, None]
        else:
            queries = self.mat_q(q).unflatten(2, (self.num_heads, -1))
        out = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, attn_mask=mask, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


# -- blocks ------------------------------------------------------------------------------------------------------------


_PARTS_OF_BLOCK = ("sa", "ca", "ca_norm", "ca_gamma", "ffn", "ln_wo_grad", "drop_path", "ada_lin", "ada_gss")


def block_obstacle(block: Any) -> str | None:
    """Why the operators cannot do what a block does."""
    return further_parts(block, *_PARTS_OF_BLOCK) or norm_obstacle(block)


class CrossBlock:
    """Methods of Infinity's block."""

    def forward(
        self: Any,
        x: torch.Tensor,
        cond_BD: torch.Tensor,
        ca_kv: Any,
        attn_bias_or_two_vector: Any,
        attn_fn: Any = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None,
        scale_ind: int = 0,
    ) -> torch.Tensor:
        def make() -> Sequence[torch.Tensor]:
            with torch.autocast(x.device.type, enabled=False):
                if hasattr(self, "ada_gss"):
                    rows = (self.ada_gss + cond_BD).squeeze(1)
                else:
                    rows = self.ada_lin(cond_BD).view(-1, 6, self.C)
                gate = (
                    self.ca_gamma
                    if isinstance(self.ca_gamma, torch.Tensor)
                    else rows.new_full((self.C,), self.ca_gamma)
                )
                return *rows.unbind(1), gate.expand(len(rows), -1)

        gate1, gate2, scale1, scale2, shift1, shift2, gate = own(self).run.once(self, make, cond_BD)
        x, eps = x.float(), self.norm_eps
        h = adaptive_layer_norm(x, scale1, shift1, eps=eps)
        arguments = h, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
        if self.checkpointing_sa_only and self.training:
            h = checkpoint(self.sa, *arguments, use_reentrant=False)
        else:
            h = self.sa(*arguments)
        x = gated_residual(x, self.drop_path(h), gate1)
        x, h = gated_residual_norm(x, self.ca(self.ca_norm(x), ca_kv), gate, scale2, shift2, eps=eps)
        return gated_residual(x, self.drop_path(self.ffn(h)), gate2)


# -- self-correction ---------------------------------------------------------------------------------------------------


def correction_obstacle(correction: Any) -> str | None:
    """Why the operators cannot do what a self-correction does."""
    quantizer = getattr(correction.vae, "quantizer", None)
    modes = getattr(quantizer, "z_interplote_up", None), getattr(quantizer, "z_interplote_down", None)
    if modes != ("trilinear", "area"):
        return f"its tokenizer resamples by {modes}, expected ('trilinear', 'area')"
    if correction.apply_spatial_patchify:
        return "its tokens are patches of 2 x 2"
    return None


class SelfCorrection:
    """Methods of `BitwiseSelfCorrection`."""

    def flip_requant(
        self: Any, vae_scale_schedule: Any, inp_B3HW: Any, raw_features: torch.Tensor, device: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = raw_features.squeeze(2) if raw_features.ndim == 5 else raw_features
        schedule = grids(vae_scale_schedule)
        if schedule is None or features.ndim != 4 or self.debug_bsc or tuple(features.shape[2:]) != schedule.finest:
            return own(self).former["flip_requant"](vae_scale_schedule, inp_B3HW, raw_features, device)
        flips, seed = None, 0
        if self.noise_apply_requant:
            drawn = np.random.randint(0, 100 * self.noise_apply_strength + 1, len(schedule)) * 0.01
            flips = [p if k < self.noise_apply_layers else 0.0 for k, p in enumerate(drawn.tolist())]
            seed = int(torch.randint(2**62, ()))
        found = bitwise_residual_quantize(features.float(), schedule, flip_probability=flips, seed=seed)
        return found.teacher_forcing, list(found.bits.int().split(schedule.lengths, 1))


PATCHES = (
    Patch(
        "attention",
        "attention without a dense mask in training, with a preallocated cache in sampling, positions in one",
        ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "caching", "cos_attn", "using_flash", "num_heads", "scale"),
        SelfAttention,
        own_attention_obstacle,
        "keys are kept in the dtype of the products, also under autocast",
    ),
    Patch(
        "texts",
        "keys and values of texts once an image, attention to them by PyTorch's own",
        ("for_attn_pool", "mat_q", "mat_kv", "v_bias", "zero_k_bias", "num_heads", "scale"),
        CrossAttention,
        lambda found: "it normalises queries and keys" if found.cos_attn else None,
        "float32 queries to texts stay in float32, where the public code rounds them to bfloat16",
    ),
    Patch(
        "blocks",
        "norms and gated residuals in one, modulations once an image",
        ("sa", "ca", "ca_norm", "ca_gamma", "ffn", "ln_wo_grad", "norm_eps", "checkpointing_sa_only"),
        CrossBlock,
        block_obstacle,
        "tokens have the positions of their scale with fused_norm=False too, where the public code forgets scale_ind",
    ),
    Patch(
        "quantizer",
        "self-correction of all scales in one",
        ("vae", "noise_apply_layers", "noise_apply_requant", "noise_apply_strength", "debug_bsc"),
        SelfCorrection,
        correction_obstacle,
        "flips of bits are drawn by a counter: seeds give others",
    ),
)
