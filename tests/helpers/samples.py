"""Small valid calls of every operator, for the checks that all of them must pass.

`SAMPLES[name](dtype)` yields (public function, keyword arguments, names of the differentiable tensors). A new operator
adds an entry here and gets the whole contract (test_contract.py), and what all kernels in Triton must pass: the
interpreter (tests/interpreted), the compiler (test_ahead_of_time.py) and a GPU (test_gpu.py). test_contract.py fails
for an operator that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvar import ops
from fastvar.schedule import ScaleSchedule
from tests.helpers.policy_losses import policy_loss

Sample = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]
SAMPLES: dict[str, Callable[[torch.dtype], Iterator[Sample]]] = {}


def sample(name: str) -> Callable[[Callable[[torch.dtype], Iterator[Sample]]], Any]:
    """Register the samples of the operator `name`."""

    def register(make: Callable[[torch.dtype], Iterator[Sample]]) -> Any:
        SAMPLES[name] = make
        return make

    return register


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal noise that depends on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def moved(value: Any, device: str) -> Any:
    """The same on another device, in named and plain tuples too."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


@sample("adaptive_layer_norm")
def _adaptive_layer_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, width in [(2, 5, 12), (0, 5, 12), (1, 1, 7), (2, 40, 6)]:
        arguments = {
            "x": noise(batch, length, width, dtype=dtype),
            "scale": noise(batch, width, dtype=dtype, seed=1),
            "shift": noise(batch, width, dtype=dtype, seed=2),
        }
        yield ops.adaptive_layer_norm, arguments, ("x", "scale", "shift")


@sample("block_causal_attention")
def _block_causal_attention(dtype: torch.dtype) -> Iterator[Sample]:
    def with_prefix(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        prefix = ops.PrefixKV(prefix_k, prefix_v, rest.pop("lengths", None))
        attend = ops.block_causal_attention_with_lse if rest.pop("with_lse", False) else ops.block_causal_attention
        return attend(q, k, v, prefix=prefix, **rest)

    for batch, grids in [(2, (1, 2, 3)), (1, (1,)), (0, (1, 2)), (1, ((1, 2), (2, 3)))]:
        schedule = ScaleSchedule(grids)
        qkv = noise(batch, schedule.num_tokens, 3, 2, 6, dtype=dtype)  # strided slices of one projection
        arguments = {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2], "schedule": schedule}
        yield ops.block_causal_attention, arguments, ("q", "k", "v")
        yield ops.block_causal_attention, {**arguments, "block_diagonal": True}, ("q", "k", "v")
    schedule = ScaleSchedule((1, 2))
    qkv = noise(4, 5, 3, 2, 6, dtype=dtype, seed=1)
    arguments = {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2], "schedule": schedule}
    arguments |= {
        "prefix_k": noise(2, 7, 2, 6, dtype=dtype, seed=2),
        "prefix_v": noise(2, 7, 2, 6, dtype=dtype, seed=3),
    }
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    yield with_prefix, arguments, names
    yield with_prefix, {**arguments, "with_lse": True}, names
    empty = {n: t[:0] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    yield with_prefix, empty, names
    yield with_prefix, {**arguments, "lengths": torch.tensor([0, 5], dtype=torch.int32)}, names
    yield with_prefix, {**arguments, "lengths": torch.tensor([7, 1]), "block_diagonal": True}, names


@sample("cached_attention")
def _cached_attention(dtype: torch.dtype) -> Iterator[Sample]:
    cache = noise(4, 9, 2, 2, 6, dtype=dtype)
    own = {"k": cache[:, :5, 0], "v": cache[:, :5, 1]}
    prefix = ops.PrefixKV(noise(2, 7, 2, 6, dtype=dtype), noise(2, 7, 2, 6, dtype=dtype, seed=1), torch.tensor([0, 3]))
    trunk = ops.PrefixKV(noise(1, 3, 2, 6, dtype=dtype), noise(1, 3, 2, 6, dtype=dtype, seed=1))
    for n in (1, 4):
        q = noise(4, n, 2, 6, dtype=dtype)
        yield ops.cached_attention, {"q": q, **own}, ()
        yield ops.cached_attention, {"q": q, **own, "prefix": prefix, "trunk": trunk}, ()
    yield ops.cached_attention, {"q": q[:0], "k": own["k"][:0], "v": own["v"][:0]}, ()


@sample("qk_norm_rope")
def _qk_norm_rope(dtype: torch.dtype) -> Iterator[Sample]:
    schedule = ScaleSchedule((1, 2))
    cos, sin = ops.rope_tables(schedule, 8)
    for batch in (2, 0):
        qkv = noise(batch, 5, 3, 3, 8, dtype=dtype)
        arguments = {"q": qkv[:, :, 0], "k": qkv[:, :, 1]}
        log_scale = torch.tensor([1.0, 6.0, -1.0], dtype=dtype)  # the second is above the clamp
        yield ops.qk_norm_rope, {**arguments, "log_scale": log_scale}, ("q", "k", "log_scale")
        yield ops.qk_norm_rope, {**arguments, "rope": (cos, sin)}, ("q", "k")
        yield ops.qk_norm_rope, {**arguments, "log_scale": log_scale, "rope": (cos, sin)}, ("q", "k", "log_scale")


@sample("qk_norm_rope_into_cache")
def _qk_norm_rope_into_cache(dtype: torch.dtype) -> Iterator[Sample]:
    def caches_in_result(**arguments: Any) -> tuple[torch.Tensor, ...]:
        like = {"dtype": arguments["q"].dtype, "device": arguments["q"].device}
        caches = torch.zeros(2, 2, 9, 3, 8, **like).unbind()
        log_scale = torch.zeros(3, device=like["device"])
        q = ops.qk_norm_rope_into_cache(
            key_cache=caches[0], value_cache=caches[1], position=4, log_scale=log_scale, **arguments
        )
        return q, *caches

    qkv = noise(2, 4, 3, 3, 8, dtype=dtype)
    yield caches_in_result, {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2]}, ()


@sample("gated_residual")
def _gated_residual(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, width in [(2, 5, 12), (0, 5, 12)]:
        arguments = {
            "x": noise(batch, length, width, dtype=dtype),
            "y": noise(batch, length, width, dtype=dtype, seed=1),
            "gate": noise(batch, width, dtype=dtype, seed=2),
        }
        yield ops.gated_residual, arguments, ("x", "y", "gate")


@sample("group_norm_silu")
def _group_norm_silu(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, channels, groups in [(2, 5, 12, 4), (0, 5, 12, 4), (1, 1, 7, 7), (2, 200, 40, 8), (1, 3, 6, 1)]:
        arguments: dict[str, Any] = {
            "x": noise(batch, length, channels, dtype=dtype),
            "weight": noise(channels, dtype=dtype, seed=1),
            "bias": noise(channels, dtype=dtype, seed=2),
            "groups": groups,
            "eps": 1e-2 if length * channels == groups else 1e-6,  # of one number a group, all is rounding over eps
        }
        yield ops.group_norm_silu, arguments, ("x", "weight", "bias")
    shift = noise(channels, dtype=dtype, seed=3)
    yield ops.group_norm_silu, {**arguments, "shift": shift}, ("x", "weight", "bias", "shift")
    yield ops.group_norm_silu, {**arguments, "silu": False}, ("x", "weight", "bias")


@sample("gated_residual_norm")
def _gated_residual_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length, width in [(2, 5, 12), (0, 5, 12), (1, 1, 7), (2, 40, 6)]:
        arguments = {
            "x": noise(batch, length, width, dtype=dtype),
            "y": noise(batch, length, width, dtype=dtype, seed=1),
        }
        modulations = noise(batch, 3, width, dtype=dtype, seed=2).unbind(1)
        arguments |= dict(zip(("gate", "scale", "shift"), modulations, strict=True))
        yield ops.gated_residual_norm, arguments, tuple(arguments)


@sample("residual_quantize")
def _residual_quantize(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, channels, grids in [(2, 4, (1, 2, (3, 5))), (0, 4, (1, 2, 3)), (1, 3, (2,)), (1, 1, (1, 1))]:
        schedule = ScaleSchedule(grids)
        arguments: dict[str, Any] = {
            "features": noise(channels, batch, *schedule.finest, dtype=dtype).transpose(0, 1),
            "codebook": noise(11, channels, dtype=dtype, seed=1),
            "schedule": schedule,
        }
        phi = _phi(2, channels, len(schedule), dtype)
        yield ops.residual_quantize, {**arguments, "phi": phi, "znorm": True}, ()
        yield ops.residual_quantize, arguments, ()


def _phi(count: int, channels: int, num_scales: int, dtype: torch.dtype) -> ops.ResidualConv:
    weight = noise(count, channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    index = ops.residual_conv_index(num_scales, count)
    return ops.ResidualConv(weight, noise(count, channels, dtype=dtype) * 0.1, 0.5, index)


@sample("accumulate_scale")
def _accumulate_scale(dtype: torch.dtype) -> Iterator[Sample]:
    def with_phi(weight: torch.Tensor, bias: torch.Tensor, **arguments: Any) -> Any:
        phi = ops.ResidualConv(weight, bias, 0.3, (1, 0, 1))
        return ops.accumulate_scale(phi=phi, **arguments)

    schedule = ScaleSchedule((1, (2, 3), (4, 5)))
    for batch, channels, scale in [(2, 3, 1), (2, 3, 0), (2, 3, 2), (0, 3, 1), (1, 1, 1)]:
        length = schedule.lengths[scale]
        arguments = {
            "tokens": torch.arange(batch * length).view(batch, length) * 5 % 7,
            "feature_map": noise(channels, batch, 5, 4, dtype=dtype).permute(1, 0, 3, 2),
            "codebook": noise(7, 2 * channels, dtype=dtype)[:, ::2],
            "schedule": schedule,
            "scale": scale,
        }
        phi = _phi(2, channels, 3, dtype)
        names = ("feature_map", "codebook", "weight", "bias")
        yield with_phi, {**arguments, "weight": phi.weight, "bias": phi.bias}, names
        yield ops.accumulate_scale, arguments, ("feature_map", "codebook")


@sample("bitwise_residual_quantize")
def _bitwise_residual_quantize(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, depth, grids in [(2, 8, (1, 2, (3, 5))), (0, 4, (1, 2, 3)), (1, 3, (2,))]:
        schedule = ScaleSchedule(grids)
        features = noise(depth, batch, *schedule.finest, dtype=dtype).transpose(0, 1)
        arguments = {"features": features, "schedule": schedule}
        flips = torch.linspace(0.5, 0, len(schedule))
        yield ops.bitwise_residual_quantize, {**arguments, "flip_probability": flips, "next_input": "area"}, ()
        yield ops.bitwise_residual_quantize, arguments, ()


@sample("accumulate_bits")
def _accumulate_bits(dtype: torch.dtype) -> Iterator[Sample]:
    schedule = ScaleSchedule((1, (2, 3), (4, 5)))
    for batch, depth, scale in [(2, 6, 1), (2, 6, 0), (2, 6, 2), (0, 6, 1), (1, 1, 1)]:
        arguments = {
            "bits": noise(batch, schedule.lengths[scale], depth) > 0,
            "feature_map": noise(depth, batch, 4, 5, dtype=dtype).transpose(0, 1),
            "schedule": schedule,
            "scale": scale,
        }
        yield ops.accumulate_bits, arguments, ("feature_map",)
        yield ops.accumulate_bits, {**arguments, "next_input": "area"}, ("feature_map",)


@sample("propagate_mask")
def _propagate_mask(dtype: torch.dtype) -> Iterator[Sample]:
    schedule = ScaleSchedule((1, 2, (3, 4), (3, 7)))
    for batch in (2, 0):
        mask = noise(batch, 7, 3, dtype=dtype).mT.clamp(min=1)
        for footprint in ("area", "support"):
            yield ops.propagate_mask, {"mask": mask - 1, "schedule": schedule, "footprint": footprint, "soft": True}, ()
            yield ops.propagate_mask, {"mask": mask > 1, "schedule": schedule, "footprint": footprint}, ()
    yield ops.propagate_mask, {"mask": torch.ones(1, 1, 1, dtype=torch.bool), "schedule": ScaleSchedule((1,))}, ()


@sample("sample_tokens")
def _sample_tokens(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, count, size in [(2, 3, 7), (0, 3, 7), (2, 0, 7), (1, 1, 1)]:
        arguments = {"logits": noise(size, count, batch, dtype=dtype).permute(2, 1, 0), "seeds": torch.arange(batch)}
        guided = {"unconditional": noise(batch, count, size, dtype=dtype), "guidance": 1.5, "temperature": 0.9}
        yield ops.sample_tokens, {**arguments, **guided, "top_k": 4, "top_p": 0.8, "log_probs": True, "position": 5}, ()
        yield ops.sample_tokens, arguments, ()


@sample("sample_bits")
def _sample_bits(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, count, size in [(2, 3, 5), (0, 3, 5), (1, 1, 1)]:
        arguments = {"logits": noise(size, count, batch, dtype=dtype).permute(2, 1, 0), "seeds": torch.arange(batch)}
        guided = {"unconditional": noise(batch, count, size, dtype=dtype), "guidance": 1.5, "temperature": 0.9}
        yield ops.sample_bits, {**arguments, **guided, "top_p": 0.8, "log_probs": True, "position": 5}, ()
        yield ops.sample_bits, arguments, ()


def _head(batch: int, length: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
    width = 6
    return {
        "hidden": noise(length, batch, width, dtype=dtype).transpose(0, 1),
        "weight": noise(width, size, dtype=dtype, seed=1).T,
        "bias": noise(size, dtype=dtype, seed=2),
    }


def _reference_head(batch: int, length: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return noise(batch, length, 4, dtype=dtype, seed=3), noise(size, 4, dtype=dtype, seed=4), noise(size, dtype=dtype)


@sample("token_log_probs")
def _token_log_probs(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length in [(2, 5), (0, 5), (1, 1)]:
        head, other = _head(batch, length, 7, dtype), _reference_head(batch, length, 7, dtype)
        tokens = torch.arange(batch * length).view(batch, length) % 7
        bits = noise(batch, length, 7, seed=5) > 0
        logits = {"hidden": noise(batch, length, 7, dtype=dtype), "weight": None, "bias": None}
        names = ("hidden", "weight", "bias")
        yield ops.token_log_probs, {**head, "tokens": tokens, "reference_head": other, "temperature": 0.7}, names
        yield ops.token_log_probs, {**head, "tokens": bits, "reference_head": other, "temperature": 0.7}, names
        yield ops.token_log_probs, {**head, "bias": None, "tokens": bits.int()}, ("hidden", "weight")
        yield ops.token_log_probs, {**logits, "tokens": tokens.int()}, ("hidden",)


@sample("cross_entropy")
def _cross_entropy(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, length in [(2, 5), (0, 5), (1, 1)]:
        head, names = _head(batch, length, 7, dtype), ("hidden", "weight", "bias")
        tokens = torch.arange(batch * length).view(batch, length) % 7
        bits = noise(batch, length, 7, seed=5) > 0
        smooth = {"label_smoothing": 0.2, "weights": torch.arange(length) + torch.ones((), dtype=dtype)}
        yield ops.cross_entropy, {**head, "tokens": tokens, **smooth}, names
        yield ops.cross_entropy, {**head, "tokens": bits, **smooth}, names


@sample("policy_loss")
def _policy_loss(dtype: torch.dtype) -> Iterator[Sample]:
    schedule = ScaleSchedule((1, 2))
    for batch in (4, 0):
        head, names = _head(batch, 5, 7, dtype), ("hidden", "weight", "bias")
        tokens = torch.arange(batch * 5).view(batch, 5) % 7
        arguments = {
            "tokens": tokens,
            "advantages": ops.group_advantages(noise(batch, dtype=dtype, seed=6), 2),
            "schedule": schedule,
            "old_log_probs": noise(batch, 5, dtype=dtype, seed=7) / 3 - 2,
            "panw_alpha": 0.6,
        }
        reference = {"reference_log_probs": noise(batch, 5, dtype=dtype, seed=8) / 3 - 2, "kl_weight": 0.1}
        exact = {"reference_head": _reference_head(batch, 5, 7, dtype), "kl_weight": 0.1, "kl_estimator": "exact"}
        mask = noise(5, batch, dtype=dtype).T.clamp(0, 1)
        yield policy_loss, {**head, **arguments, **reference}, names
        yield policy_loss, {**head, **arguments, **exact, "entropy_weight": 0.1, "token_mask": mask}, names
        bits = {"tokens": noise(batch, 5, 7) > 0, "ratio_level": "scale", "panw_normalisation": "per_scale"}
        yield policy_loss, {**head, **arguments, **reference, **bits, "kl_estimator": "k2"}, names
        logits = {"hidden": noise(batch, 5, 7, dtype=dtype), "weight": None, "bias": None, "ratio_level": "sample"}
        yield policy_loss, {**logits, **arguments, "panw_normalisation": "none", "first_scale": 1}, ("hidden",)
