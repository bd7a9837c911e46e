"""Sampling of an Infinity: the text once, then scale after scale on a preallocated cache; forks of a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from fastvar.models.infinity_block import attend_to_cache, rotations
from fastvar.models.kv_cache import KVCache
from fastvar.models.sampling import Generation, sample_seeds
from fastvar.models.text import TextFeatures, TextKV
from fastvar.models.var_block import Modulations
from fastvar.ops import SampledBits, adaptive_layer_norm, gated_residual_norm, sample_bits
from fastvar.profiling import annotate
from fastvar.ranges import GUIDANCE, TEMPERATURE, Range
from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from fastvar.models.infinity import Infinity, Texts

CFG = Range(GUIDANCE.low + 1, GUIDANCE.high)  # the operators count from 1 less


@dataclass
class BitState:
    """A set of partly sampled images, at the start of scale `scale`.

    Attributes:
        schedule: the grids.
        guidance_layer: where guidance mixes, see `generate`.
        scale: the next scale to sample, 0 to K.
        tokens: (B, e_scale, d) bool, sampled so far.
        feature_map: (B, c, h, w) of the scales sampled so far.
        inputs: (B, n, d) of the next scale; None at scale 0 and after the last scale.
        condition: (R, C), R = B, or 2 B with guidance: conditional rows, then unconditional.
        texts: per block what these rows see of their texts.
        modulations: of these rows.
        cache: keys and values of these rows.
        cached: how many of the sampled tokens lie in the cache's own rows, not in its trunk.
        log_probs, sampled_log_probs: (B, e_scale) as `fastvar.ops.SampledBits`, or None.
    """

    schedule: ScaleSchedule
    guidance_layer: int
    scale: int
    tokens: torch.Tensor
    feature_map: torch.Tensor
    inputs: torch.Tensor | None
    condition: torch.Tensor
    texts: list[TextKV]
    modulations: Modulations
    cache: KVCache
    cached: int
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None

    @property
    def guided(self) -> bool:
        """Whether the state has unconditional rows."""
        return self.condition.shape[0] != self.tokens.shape[0]

    def fork(self, times: int) -> BitState:
        """`times` continuations of every image: row b of the new state continues image b // times.

        The cached keys and values are shared, nothing is recomputed. Continue with
        `net.generate(state=state.fork(times), seed=...)`.

        Args:
            times: continuations per image, at least 1.
        """
        if times < 1:
            raise ValueError(f"BitState.fork: times: expected at least 1, got {times}")

        def repeated(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.repeat_interleave(times, 0)

        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else repeated(tensor)

        return replace(
            self,
            tokens=repeated(self.tokens),
            feature_map=repeated(self.feature_map),
            inputs=maybe(self.inputs),
            condition=repeated(self.condition),
            texts=[text.map(repeated) for text in self.texts],
            modulations=self.modulations.map(repeated),
            cache=self.cache.fork(times),
            cached=0,
            log_probs=maybe(self.log_probs),
            sampled_log_probs=maybe(self.sampled_log_probs),
        )


def one_per_scale(name: str, value: Any, num_scales: int, allowed: Range) -> tuple[float, ...]:
    """A number for each scale: one number for all, or a sequence, array or tensor of as many as there are scales.

    Raises:
        ValueError: anything else, another number of them, or one that is not allowed.
    """
    if hasattr(value, "tolist"):  # an array's or a tensor's
        value = value.tolist()
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * num_scales
    if not all(isinstance(number, Real) for number in numbers):
        raise ValueError(f"generate: {name}: expected a number or {num_scales} of them, got {value!r}")
    if len(numbers) != num_scales:
        raise ValueError(f"generate: {name}: expected a number or {num_scales} of them, got {len(numbers)}")
    for number in numbers:
        expected = allowed.problem(number)
        if expected is not None:
            raise ValueError(f"generate: {name}: expected {expected}, got {number}")
    return tuple(float(number) for number in numbers)


@torch.no_grad()
def generate(
    net: Infinity,
    texts: Texts | None = None,
    *,
    negative: Texts | None = None,
    guidance: float | Sequence[float] = 1.0,
    guidance_layer: int | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    first_sample: int = 0,
    schedule: ScaleSchedule | None = None,
    stop: int | None = None,
    state: BitState | None = None,
    log_probs: bool = False,
    decode: bool = True,
    decode_dtype: torch.dtype | None = None,
) -> Generation:
    """Sample images for texts, or continue a state.

    Args:
        net: the model; put it in evaluation mode.
        texts: B of them, or their features.
        negative: B texts to keep away from, in place of the one that says nothing; without guidance they do nothing.
        guidance: g in g conditional + (1 - g) unconditional, one number or one a scale: Infinity's `cfg`. 1 is no
            guidance, and if it is 1 for all scales the unconditional rows are not computed.
        guidance_layer: what guidance mixes. 0: the logits. n from 1 to depth - 1: the hidden states after block
            depth - n, counted from 0, as Infinity's -n; the blocks after it run on the mixture alone. None is 0, or the
            state's own.
        temperature: divides the logits, one number or one a scale: Infinity's `tau`.
        top_k, top_p: see `fastvar.ops.sample_bits`; of a bit any top_k above 1 keeps both values, as 0 does.
        seed: of the run. Sample i depends on (seed, first_sample + i) and its text, not on the batch it is in.
        first_sample: index of the first sample, to draw a large set in several batches.
        schedule: the grids, see `fastvar.schedule.infinity_schedule`; the config's by default.
        stop: stop before this scale (1 to K); the state continues from there. K by default.
        state: continue this state instead of starting from texts; it is consumed (fork it to keep it). Guidance can
            only be kept if it was on before.
        log_probs: also return log-probabilities of the tokens drawn; with a state only if it has them for its tokens.
            Where guidance mixes hidden states, the model's own distribution is that of the mixture.
        decode: whether to decode the feature map to images.
        decode_dtype: what to decode in, see `BSQTokenizer.decode_features`; by default bfloat16 if that is the dtype of
            the model's weights, else that of the tokenizer's.

    Returns:
        tokens (B, L', d) bool, images (B, 3, H, W) in [0, 1], log-probabilities (B, L') of tokens, summed over bits.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    if (texts is None) == (state is None):
        raise ValueError("generate: texts, state: expected exactly one of them")
    if state is None:
        schedule = net.schedule if schedule is None else net.config.check_schedule(schedule)
        guidance_layer = 0 if guidance_layer is None else guidance_layer
    else:
        if negative is not None:
            raise ValueError("generate: negative: expected None with a state, which has its own, got some")
        if schedule is not None and schedule != state.schedule:
            raise ValueError(f"generate: schedule: expected None or the state's own, {state.schedule}, got {schedule}")
        if guidance_layer is not None and guidance_layer != state.guidance_layer:
            raise ValueError(
                f"generate: guidance_layer: expected None or the state's own, {state.guidance_layer}, "
                f"got {guidance_layer}"
            )
        schedule, guidance_layer = state.schedule, state.guidance_layer
    weights = one_per_scale("guidance", guidance, len(schedule), CFG)
    temperatures = one_per_scale("temperature", temperature, len(schedule), TEMPERATURE)
    if not 0 <= guidance_layer < net.config.depth:
        raise ValueError(
            f"generate: guidance_layer: expected 0 to {net.config.depth - 1}, one less than blocks, "
            f"got {guidance_layer}"
        )
    if top_k < 0:
        raise ValueError(f"generate: top_k: expected at least 0, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"generate: top_p: expected a probability from 0 to 1, got {top_p}")
    first = 0 if state is None else state.scale
    if first == len(schedule):
        raise ValueError(
            "generate: state: expected one that is not finished; it was continued before (fork it to keep it)"
        )
    stop = len(schedule) if stop is None else stop
    if not first < stop <= len(schedule):
        raise ValueError(f"generate: stop: expected {first + 1} to {len(schedule)}, got {stop}")
    if state is None:
        assert texts is not None
        guided = any(weight != 1 for weight in weights)
        state = _start(net, net.features(texts), negative, schedule, guided, guidance_layer, log_probs)
    elif any(weight != 1 for weight in weights[first:stop]) and not state.guided and len(state.tokens):
        raise ValueError("generate: guidance: expected 1, the state was sampled without guidance")
    elif log_probs and state.log_probs is None:
        raise ValueError("generate: log_probs: expected False, the state was sampled without log-probabilities")
    seeds, tokenizer = sample_seeds(seed, len(state.tokens), first_sample, net.device), net.tokenizer
    # all arguments were checked; from here on the state changes
    if not log_probs:  # those of a part of the tokens would be of no use
        state.log_probs = state.sampled_log_probs = None
    _sample_scales(net, state, seeds, weights, temperatures, min(top_k, 2), top_p, stop)
    images = None
    if decode:
        if decode_dtype is None and net.head.weight.dtype == torch.bfloat16:
            decode_dtype = torch.bfloat16
        images = tokenizer.decode_features(state.feature_map, dtype=decode_dtype)
        images = images.float().clamp(-1, 1).add(1).mul(0.5)
    unfinished = state if stop < len(schedule) else None
    return Generation(state.tokens, images, state.log_probs, state.sampled_log_probs, unfinished)  # type: ignore[arg-type]


def _start(
    net: Infinity,
    texts: TextFeatures,
    negative: Texts | None,
    schedule: ScaleSchedule,
    guided: bool,
    guidance_layer: int,
    log_probs: bool,
) -> BitState:
    batch = len(texts.lengths)
    if guided:
        against = net.no_text(texts.lengths) if negative is None else net.features(negative)
        if len(against.lengths) != batch:
            raise ValueError(f"generate: negative: expected {batch} texts, got {len(against.lengths)}")
        texts = TextFeatures.joined([texts, against])
    condition, read = net.read(texts)
    config, weight = net.config, net.head.weight
    device = weight.device
    autocast = torch.is_autocast_enabled(device.type)
    cache = KVCache(
        config.depth,
        len(condition),
        0,  # reserved before it is filled
        config.num_heads,
        config.head_dim,
        dtype=torch.get_autocast_dtype(device.type) if autocast else weight.dtype,
        device=device,
    )
    feature_map = net.tokenizer.empty_feature_map(batch, schedule)
    nothing = feature_map.new_zeros(batch, 0) if log_probs else None
    return BitState(
        schedule,
        guidance_layer,
        0,
        torch.empty(batch, 0, config.bits, dtype=torch.bool, device=device),
        feature_map,
        None,
        condition,
        read,
        net.modulations(condition),
        cache,
        0,
        nothing,
        nothing,
    )


def _sample_scales(
    net: Infinity,
    state: BitState,
    seeds: torch.Tensor,
    guidance: Sequence[float],
    temperatures: Sequence[float],
    top_k: int,
    top_p: float,
    stop: int,
) -> None:
    """Sample the scales from `state.scale` to `stop`; the state is carried on. Nothing waits for the device."""
    schedule, batch = state.schedule, len(state.tokens)
    # a state that stops early has no room for the rest: as a trunk of forks it would stay empty
    state.cache.reserve(state.cached + schedule.ends[stop - 1] - schedule.starts[state.scale])
    scales: list[SampledBits] = []
    for k in range(state.scale, stop):
        with annotate(f"scale {k}"):
            weight = guidance[k] - 1  # as the operators count it
            logits = net.logits(_scale_hidden(net, state, k, guidance[k]))
            drawn = sample_bits(
                logits[:batch],
                unconditional=logits[batch:] if len(logits) > batch else None,
                guidance=weight if len(logits) > batch else 0.0,
                temperature=temperatures[k],
                top_k=top_k,
                top_p=top_p,
                seeds=seeds,
                position=schedule.starts[k],
                log_probs=state.log_probs is not None,
            )
            state.feature_map, state.inputs = net.tokenizer.accumulate(
                drawn.bits, state.feature_map, k, schedule=schedule
            )
            scales.append(drawn)
            state.cached += schedule.lengths[k]
            state.scale = k + 1
    state.tokens = torch.cat([state.tokens, *(drawn.bits for drawn in scales)], 1)
    for name in ("log_probs", "sampled_log_probs"):
        if getattr(state, name) is not None:
            setattr(state, name, torch.cat([getattr(state, name), *(getattr(drawn, name) for drawn in scales)], 1))


def _scale_hidden(net: Infinity, state: BitState, scale: int, guidance: float) -> torch.Tensor:
    """The hidden states before the head of a scale: of the conditional rows, and where guidance mixes the logits of the
    unconditional ones after them. Keys and values are cached."""
    schedule, eps, batch = state.schedule, net.config.norm_eps, len(state.tokens)
    start, length, end = schedule.starts[scale], schedule.lengths[scale], state.cached + schedule.lengths[scale]
    cos, sin = rotations(schedule, net.config.head_dim, net.device)
    rope = cos[start : start + length], sin[start : start + length]
    inputs = state.inputs
    if state.guided and inputs is not None:
        inputs = torch.cat([inputs, inputs])
    x = net.embed(state.condition, inputs, schedule, start)
    modulations, texts = state.modulations, state.texts
    # the block after which guidance mixes the hidden states; none if it mixes logits
    last = len(net.blocks) - (state.guidance_layer if state.guided else 0)
    h = adaptive_layer_norm(x, *_norm(modulations, 0), eps=eps)
    for i, block in enumerate(net.blocks):
        modulation, bias = modulations.blocks[i], modulations.biases[i]
        attend = attend_to_cache(state.cache, i, len(x), state.cached, end, rope)
        x, h = block.mix(x, h, modulation, attend, bias, texts[i])
        x, h = gated_residual_norm(x, h, modulation[:, 1], *_norm(modulations, i + 1), eps=eps)
        if i == last:  # nothing of the unconditional rows reaches the bits any more
            x = x[:batch] if guidance == 1 else guidance * x[:batch] + (1 - guidance) * x[batch:]
            modulations = modulations.map(lambda rows: rows[:batch])
            texts = [text.map(lambda rows: rows[:batch]) for text in texts]
            h = adaptive_layer_norm(x, *_norm(modulations, i + 1), eps=eps)
    state.cache.length = end
    return h[:batch] if guidance == 1 else h


def _norm(modulations: Modulations, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (B, C) of the norm that a block begins with, or of the head's after the last one."""
    if block == len(modulations.blocks):
        return modulations.head[:, 0], modulations.head[:, 1]
    return modulations.blocks[block][:, 2], modulations.blocks[block][:, 4]
