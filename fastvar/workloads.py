"""Calls of the operators at models' sizes, forward and with gradients: what `fastvar tune` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvar import ops
from fastvar.schedule import ScaleSchedule

Call = Callable[[], Any]  # answers tensors


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and a batch."""

    name: str
    grids: str
    batch: int
    heads: int
    head_dim: int
    rope: bool = False
    vocab_size: int = 4096

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.parse(self.grids)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SHAPES = (
    Shape("VAR-d16, 256 px", "var-256", 32, 16, 64),
    Shape("Infinity-2B, 1M", "infinity-1M-1.000", 2, 16, 128, rope=True),
    Shape("VAR-d36, 512 px", "var-512", 8, 36, 64),
)


@dataclass(frozen=True)
class Workload:
    """A call of an operator whose kernels are tuned.

    Attributes:
        op: the operator.
        name: what is called, for people.
        build: from a device, dtype and backend to the call.
    """

    op: str
    name: str
    build: Callable[[torch.device, torch.dtype, str], Call]


def workloads(shapes: Sequence[Shape] = SHAPES) -> list[Workload]:
    """What is tuned, the most important first."""
    listed = []
    for make in (_attention, _rows, _losses, _cached_attention, _quantiser, _tokenizer, _sampling):
        for shape in shapes:
            listed += list(make(shape))
    return listed


def tensors(result: Any) -> list[torch.Tensor]:
    """Those of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for value in result or () for t in tensors(value)] if isinstance(result, tuple | list) else []


def _attention(shape: Shape) -> Iterator[Workload]:
    def build(device: torch.device, dtype: torch.dtype, backend: str, shared: bool, training: bool) -> Call:
        size = (shape.batch, shape.schedule.num_tokens, shape.heads, shape.head_dim)
        q, k, v = (_normal(size, device, dtype) for _ in range(3))
        prefix = (_normal((1, *size[1:]), device, dtype) for _ in range(2))
        inputs = [q, k, v, *(prefix if shared else ())]

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *prefix: torch.Tensor) -> torch.Tensor:
            pair = ops.PrefixKV(*prefix) if prefix else None
            return ops.block_causal_attention(q, k, v, shape.schedule, prefix=pair, backend=backend)

        return _call(call, inputs, training)

    for shared in (False, True):
        name = f"{shape.name}, batch {shape.batch}{', shared prefix' * shared}"
        yield from _passes("block_causal_attention", name, build, shared)


def _cached_attention(shape: Shape) -> Iterator[Workload]:
    schedule = shape.schedule
    for scale in (0, len(schedule) // 2, len(schedule) - 1):

        def build(device: torch.device, dtype: torch.dtype, backend: str, scale: int = scale) -> Call:
            width = (shape.heads, shape.head_dim)
            q = _normal((shape.batch, schedule.lengths[scale], *width), device, dtype)
            k, v = (_normal((shape.batch, sum(schedule.lengths[: scale + 1]), *width), device, dtype) for _ in range(2))
            return _call(lambda q, k, v: ops.cached_attention(q, k, v, backend=backend), [q, k, v], False)

        yield Workload("cached_attention", f"{shape.name}, batch {shape.batch}, scale {scale + 1}", build)


def _rows(shape: Shape) -> Iterator[Workload]:
    batch, length, width = shape.batch, shape.schedule.num_tokens, shape.width

    def qk_norm_rope(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        size = (batch, length, shape.heads, shape.head_dim)
        rope = ops.rope_tables(shape.schedule, shape.head_dim, device=device) if shape.rope else None
        log_scale = torch.full((shape.heads,), 1.4, device=device)

        def call(q: torch.Tensor, k: torch.Tensor, log_scale: torch.Tensor) -> Any:
            return ops.qk_norm_rope(q, k, log_scale=log_scale, rope=rope, backend=backend)

        return _call(call, [*(_normal(size, device, dtype) for _ in range(2)), log_scale], training)

    def adaptive_layer_norm(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        inputs = [_normal(size, device, dtype) for size in ((batch, length, width), (batch, width), (batch, width))]
        return _call(
            lambda x, scale, shift: ops.adaptive_layer_norm(x, scale, shift, backend=backend), inputs, training
        )

    def gated_residual(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        inputs = [_normal(size, device, dtype) for size in (*[(batch, length, width)] * 2, (batch, width))]
        return _call(lambda x, y, gate: ops.gated_residual(x, y, gate, backend=backend), inputs, training)

    def gated_residual_norm(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        inputs = [_normal(size, device, dtype) for size in (*[(batch, length, width)] * 2, *[(batch, width)] * 3)]
        return _call(lambda *given: ops.gated_residual_norm(*given, backend=backend), inputs, training)

    for build in (qk_norm_rope, adaptive_layer_norm, gated_residual, gated_residual_norm):
        yield from _passes(build.__name__, f"{shape.name}, batch {batch}", build)


def _losses(shape: Shape) -> Iterator[Workload]:
    if shape.rope:  # bits, whose head is small
        return
    batch, length = shape.batch, shape.schedule.num_tokens

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        weight = _normal((shape.vocab_size, shape.width), device, dtype) * shape.width**-0.5
        tokens = torch.arange(batch * length, device=device).reshape(batch, length) % shape.vocab_size
        return [_normal((batch, length, shape.width), device, dtype), weight], tokens

    def policy_loss(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        given, tokens = inputs(device, dtype)
        advantages = torch.linspace(-1, 1, batch, device=device)

        def call(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return ops.policy_loss((hidden, weight, None), tokens, advantages, shape.schedule, backend=backend).loss

        return _call(call, given, training)

    def token_log_probs(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        given, tokens = inputs(device, dtype)
        return _call(
            lambda hidden, weight: ops.token_log_probs(hidden, weight, None, tokens, backend=backend).log_probs,
            given,
            training,
        )

    for build in (policy_loss, token_log_probs):
        yield from _passes(build.__name__, f"{shape.name}, batch {batch}", build)


def _quantiser(shape: Shape) -> Iterator[Workload]:
    if shape.rope:  # bits, which need no search
        return

    def build(device: torch.device, dtype: torch.dtype, backend: str) -> Call:
        features = _normal((shape.batch, 32, *shape.schedule.finest), device, torch.float32)
        codebook = _normal((shape.vocab_size, 32), device, torch.float32)

        def call(features: torch.Tensor) -> Any:
            return ops.residual_quantize(features, codebook, shape.schedule, backend=backend)

        return _call(call, [features], False)

    yield Workload("residual_quantize", f"{shape.name}, batch {shape.batch}", build)


def _tokenizer(shape: Shape) -> Iterator[Workload]:
    """The largest norm of a tokenizer: full resolution, 160 channels."""
    if shape.rope:
        return

    def build(device: torch.device, dtype: torch.dtype, backend: str, training: bool) -> Call:
        height, width = shape.schedule.finest
        x = _normal((max(1, shape.batch // 4), 256 * height * width, 160), device, dtype)
        weight, bias = (_normal((160,), device, torch.float32) for _ in range(2))

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return ops.group_norm_silu(x, weight, bias, groups=32, backend=backend)

        return _call(call, [x, weight, bias], training)

    yield from _passes("group_norm_silu", f"{shape.name}, batch {max(1, shape.batch // 4)}, 160 channels", build)


def _sampling(shape: Shape) -> Iterator[Workload]:
    if shape.rope:
        return

    def build(device: torch.device, dtype: torch.dtype, backend: str) -> Call:
        size = (shape.batch, shape.schedule.lengths[-1], shape.vocab_size)
        logits = [4 * _normal(size, device, torch.float32) for _ in range(2)]
        seeds = torch.arange(shape.batch, device=device)

        def call(a: torch.Tensor, b: torch.Tensor) -> Any:
            return ops.sample_tokens(
                a,
                unconditional=b,
                guidance=1.5,
                top_k=900,
                top_p=0.96,
                seeds=seeds,
                log_probs=True,
                backend=backend,
            )

        return _call(call, logits, False)

    yield Workload("sample_tokens", f"{shape.name}, batch {shape.batch}, last scale", build)


def _passes(op: str, name: str, build: Callable[..., Call], *more: Any) -> Iterator[Workload]:
    """A forward pass alone, in which kernels of the forward pass are told apart best, and both."""
    for training in (False, True):

        def built(device: torch.device, dtype: torch.dtype, backend: str, training: bool = training) -> Call:
            return build(device, dtype, backend, *more, training)

        yield Workload(op, f"{name}, {'training' if training else 'forward'}", built)


def _call(function: Callable[..., Any], inputs: Sequence[torch.Tensor], training: bool) -> Call:
    """A call that answers the results and, in training, the gradients of their weighted sum for all inputs."""
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs]
    weights: list[torch.Tensor] = []

    def both() -> Any:
        results = tensors(function(*leaves))
        if not weights:
            weights.extend(_normal(t.shape, t.device, t.dtype) if t.ndim else torch.ones_like(t) for t in results)
        return [t.detach() for t in results], torch.autograd.grad(results, leaves, weights)

    return both


def _normal(size: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(sum(size))
    return torch.randn(tuple(size), generator=generator, device=device).to(dtype)
