"""Sampling of a VAR: the subject's prefix once, then scale after scale on a preallocated cache; forks of a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastvar.models.graphs import replay, survey
from fastvar.models.kv_cache import KVCache
from fastvar.ops import PrefixKV, SampledTokens, accumulate_scale, sample_tokens
from fastvar.pictures import image_grid, png
from fastvar.profiling import annotate
from fastvar.ranges import GUIDANCE, TEMPERATURE

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastvar.models.var import VAR, Labels
    from fastvar.models.var_block import Modulations

DECODED_AT_ONCE = 16 * 256 * 256  # pixels of a call that are decoded within its graph


@dataclass
class SamplingState:
    """A set of partly sampled images, at the start of scale `scale`.

    Attributes:
        scale: the next scale to sample, 0 to K.
        tokens: (B, e_scale) int64, sampled so far.
        feature_map: (B, C, h, w) of the scales sampled so far.
        inputs: (B, n, C) of the next scale; None at scale 0 and after the last scale.
        condition: (R, 1 + T, C) as `VAR.condition`, R = B, or 2 B with guidance: conditional rows, then unconditional.
        modulations: of these rows.
        cache: keys and values of these rows.
        cached: how many of the sampled tokens lie in the cache's own rows, not in its trunk.
        log_probs, sampled_log_probs: (B, e_scale) as `fastvar.ops.SampledTokens`, or None.
    """

    scale: int
    tokens: torch.Tensor
    feature_map: torch.Tensor
    inputs: torch.Tensor | None
    condition: torch.Tensor
    modulations: Modulations
    cache: KVCache
    cached: int
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    def state(self, var: VAR) -> SamplingState:
        """Itself."""
        return self

    @property
    def guided(self) -> bool:
        """Whether the state has unconditional rows."""
        return self.condition.shape[0] != self.tokens.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SamplingState:
        """A state of `function` of each of this one's tensors, always in the same order; of its cache only what is
        filled."""

        def mapped(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            tokens=function(self.tokens),
            feature_map=function(self.feature_map),
            inputs=mapped(self.inputs),
            condition=function(self.condition),
            modulations=self.modulations.map(function)._replace(
                biases=[function(bias) for bias in self.modulations.biases]
            ),
            cache=self.cache.map(function),
            log_probs=mapped(self.log_probs),
            sampled_log_probs=mapped(self.sampled_log_probs),
        )

    def fork(self, times: int) -> SamplingState:
        """`times` continuations of every image: row b of the new state continues image b // times.

        The cached keys and values are shared, nothing is recomputed. Continue with
        `var.generate(state=state.fork(times), seed=...)`.

        Args:
            times: continuations per image, at least 1.
        """
        if times < 1:
            raise ValueError(f"SamplingState.fork: times: expected at least 1, got {times}")

        def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(times, 0)

        return SamplingState(
            self.scale,
            self.tokens.repeat_interleave(times, 0),
            self.feature_map.repeat_interleave(times, 0),
            repeated(self.inputs),
            self.condition.repeat_interleave(times, 0),
            self.modulations.map(lambda rows: rows.repeat_interleave(times, 0)),
            self.cache.fork(times),
            0,
            repeated(self.log_probs),
            repeated(self.sampled_log_probs),
        )


class Generation(NamedTuple):
    """What `generate` of a VAR or an Infinity answers.

    Attributes:
        tokens: (B, L') int64, L' the tokens of the scales sampled; of an Infinity their bits (B, L', d) bool.
        images: (B, 3, H, W) in [0, 1], or None without decoding.
        log_probs: (B, L') float32 of the tokens under the model itself (at the temperature, but without guidance and
            truncation), or None.
        sampled_log_probs: (B, L') float32 under the distribution they were drawn from, or None.
        state: where sampling stopped, to be forked or continued; None after the last scale, so that a result does not
            keep the cache's memory.
    """

    tokens: torch.Tensor
    images: torch.Tensor | None
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None
    state: SamplingState | None

    def picture(self, columns: int = 8) -> Image:
        """The images as one PIL image, `columns` a row; a notebook shows it.

        Raises:
            ValueError: nothing was decoded.
        """
        if self.images is None or not len(self.images):
            raise ValueError("Generation: images: expected some, got none: nothing was decoded")
        return image_grid(self.images, columns)

    def _repr_png_(self) -> bytes | None:
        return None if self.images is None or not len(self.images) else png(self.picture())


def sample_seeds(seed: int, count: int, first_sample: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """One 64-bit seed per sample, (count,) int64, from a run's seed and the sample's index.

    Args:
        seed: of the run, 0 to 2^31 - 1.
        count: number of samples.
        first_sample: index of the first of them.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"generate: seed: expected 0 to 2^31 - 1, got {seed}")
    return (torch.arange(first_sample, first_sample + count, device=device) & 0xFFFFFFFF) | (seed << 32)


def guidance_per_scale(guidance: float | Sequence[float], num_scales: int) -> list[float]:
    """The weight t_k of each scale in (1 + t_k) conditional - t_k unconditional.

    A number g grows linearly, t_k = g k / (K - 1), as VAR samples (g itself if K = 1); a sequence of K numbers is taken
    as it is, an array or a tensor of them too.
    """
    if hasattr(guidance, "tolist"):
        guidance = guidance.tolist()
    for weight in guidance if isinstance(guidance, Sequence) else [guidance]:
        expected = GUIDANCE.problem(weight)
        if expected is not None:
            raise ValueError(f"generate: guidance: expected {expected}, got {weight}")
    if not isinstance(guidance, Sequence):
        return [float(guidance) * (k / (num_scales - 1) if num_scales > 1 else 1.0) for k in range(num_scales)]
    weights = [float(weight) for weight in guidance]
    if len(weights) != num_scales:
        raise ValueError(f"generate: guidance: expected a number or {num_scales} of them, got {len(weights)}")
    return weights


class SamplingOptions(NamedTuple):
    """How scales are sampled; see `generate`.

    Attributes:
        guidance: the weight of each scale.
        stop: the scale to stop before.
        decode: whether to decode the feature map in one go with sampling.
        decode_dtype: what to decode in.
    """

    guidance: tuple[float, ...]
    temperature: float
    top_k: int
    top_p: float
    log_probs: bool
    stop: int
    decode: bool
    decode_dtype: torch.dtype | None


class Drawn(NamedTuple):
    """What a call has sampled: `Generation` with the feature map, and images only if they were decoded at once."""

    tokens: torch.Tensor
    feature_map: torch.Tensor
    images: torch.Tensor | None
    log_probs: torch.Tensor | None
    sampled_log_probs: torch.Tensor | None
    state: SamplingState | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Drawn:
        """`function` of each tensor."""
        fields: dict[str, Any] = self._asdict()
        for name, value in fields.items():
            if value is not None:
                fields[name] = value.map(function) if name == "state" else function(value)
        return Drawn(**fields)


def draw(var: VAR, state: SamplingState, seeds: torch.Tensor, options: SamplingOptions) -> Drawn:
    """Sample to `options.stop` and decode; the state is carried on. Nothing waits for the device."""
    sample_scales(var, state, seeds, options)
    images = decoded(var, state.feature_map, options.decode_dtype) if options.decode else None
    unfinished = state if options.stop < len(var.schedule) else None
    return Drawn(state.tokens, state.feature_map, images, state.log_probs, state.sampled_log_probs, unfinished)


def decoded(var: VAR, feature_map: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Feature map (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""
    images = var.tokenizer.decode_features(feature_map, dtype=dtype)
    return images.float().clamp(-1, 1).add(1).mul(0.5)


def sample_scales(var: VAR, state: SamplingState, seeds: torch.Tensor, options: SamplingOptions) -> None:
    """Sample the scales from `state.scale` to `options.stop`; the state is carried on. Nothing waits for the device.

    Args:
        var: the model.
        state: of B images.
        seeds: (B,) int64, see `sample_seeds`.
        options: how.
    """
    schedule, batch = var.schedule, state.tokens.shape[0]
    # a state that stops early has no room for the rest: as a trunk of forks it would stay empty
    state.cache.reserve(state.cached + schedule.ends[options.stop - 1] - schedule.starts[state.scale])
    codebook, phi = var.tokenizer.codebook, var.tokenizer.phi
    positions = var.positions(0, schedule.ends[options.stop - 1])
    scales: list[SampledTokens] = []
    for k in range(state.scale, options.stop):
        with annotate(f"scale {k}"):
            start, length, weight = schedule.starts[k], schedule.lengths[k], options.guidance[k]
            inputs = state.inputs
            if state.guided and inputs is not None:
                inputs = torch.cat([inputs, inputs])
            x = var.embed(state.condition, inputs, start, positions)
            hidden = var.sample_scale(
                x, state.modulations, state.cache, position=state.cached, end=state.cached + length
            )
            logits = var.head(hidden)
            drawn = sample_tokens(
                logits[:batch],
                unconditional=logits[batch:] if state.guided and weight else None,
                guidance=weight if state.guided else 0.0,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seeds=seeds,
                position=start,
                log_probs=options.log_probs,
            )
            state.feature_map, state.inputs = accumulate_scale(
                drawn.tokens, state.feature_map, codebook, schedule, k, phi=phi
            )
            scales.append(drawn)
            state.cached += length
            state.scale = k + 1
    for name in ("tokens", "log_probs", "sampled_log_probs"):
        before = getattr(state, name)
        if before is not None:
            setattr(state, name, torch.cat([before, *(getattr(drawn, name) for drawn in scales)], 1))


@torch.no_grad()
def generate(
    var: VAR,
    labels: Labels | None = None,
    *,
    subject: torch.Tensor | None = None,
    guidance: float | Sequence[float] = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    first_sample: int = 0,
    stop: int | None = None,
    state: SamplingState | None = None,
    log_probs: bool = False,
    decode: bool = True,
    decode_dtype: torch.dtype | None = None,
    graphs: bool | None = None,
) -> Generation:
    """Sample images for labels, or continue a state.

    Args:
        var: the model; put it in evaluation mode.
        labels: (B,) class indices or names, or texts, or characters (B, text_length).
        subject: (B / G, L, C), `VQTokenizer.pyramid` of the reference subjects' tokens, each shared by G adjacent
            samples. Guidance contrasts with neither condition nor subject.
        guidance: classifier-free guidance, see `guidance_per_scale`; 0 runs the conditional rows alone.
        temperature, top_k, top_p: see `fastvar.ops.sample_tokens`; 0 and 1 switch top_k and top_p off.
        seed: of the run. Sample i depends on (seed, first_sample + i) and its label, not on the batch it is in.
        first_sample: index of the first sample, to draw a large set in several batches.
        stop: stop before this scale (1 to K); the state continues from there. K by default.
        state: continue this state instead of starting from labels; it is consumed (fork it to keep it). Guidance can
            only be kept if it was on before.
        log_probs: also return log-probabilities of the tokens drawn; with a state only if it has them for its tokens.
        decode: whether to decode the feature map to images.
        decode_dtype: what to decode in, see `VQTokenizer.decode_features`; by default bfloat16 if that is the dtype of
            the model's weights, else that of the tokenizer's. Pictures decoded in bfloat16 differ a little from those
            in float32, which torch.float32 gives with a tokenizer of float32 weights.
        graphs: sample by a CUDA graph, which spares the launches of a few thousand small kernels an image; the tokens
            are the same. None takes one where it can: on a GPU, in evaluation mode, from the second call with the same
            shapes and options on; True takes one at once, or raises; False does not. See `fastvar.models.graphs` for
            what is captured apart, and for how much memory it may take.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    schedule, tokenizer = var.schedule, var.tokenizer
    weights = guidance_per_scale(guidance, len(schedule))
    if (labels is None) == (state is None):
        raise ValueError("generate: labels, state: expected exactly one of them")
    start: SamplingState | Beginning
    if state is None:
        assert labels is not None
        start = Beginning(var.indices(labels), subject, any(weights), log_probs)
    else:
        start = state
        if subject is not None:
            raise ValueError("generate: subject: expected None with a state, which has its own")
        if state.scale == len(schedule):
            raise ValueError(
                "generate: state: expected one that is not finished; it was continued before (fork it to keep it)"
            )
    stop = len(schedule) if stop is None else stop
    if not start.scale < stop <= len(schedule):
        raise ValueError(f"generate: stop: expected {start.scale + 1} to {len(schedule)}, got {stop}")
    batch = start.batch
    if any(weights[start.scale : stop]) and not start.guided and batch:
        raise ValueError("generate: guidance: expected 0, the state was sampled without guidance")
    if state is not None and log_probs and state.log_probs is None:
        raise ValueError("generate: log_probs: expected False, the state was sampled without log-probabilities")
    if top_k < 0:
        raise ValueError(f"generate: top_k: expected at least 0, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"generate: top_p: expected a probability from 0 to 1, got {top_p}")
    expected = TEMPERATURE.problem(temperature)
    if expected is not None:
        raise ValueError(
            f"generate: temperature: expected {expected} (for the likeliest one top_k=1), got {temperature}"
        )
    if decode_dtype is None and var.head.weight.dtype == torch.bfloat16:
        decode_dtype = torch.bfloat16
    surveyed = None if graphs is False else survey(var, must=graphs is True)
    surveyed = surveyed if batch else None
    # the launches of many images are hidden behind their sampling, and their activations are large
    at_once = decode and (surveyed is None or batch * math.prod(tokenizer.config.image_size) <= DECODED_AT_ONCE)
    options = SamplingOptions(tuple(weights), temperature, top_k, top_p, log_probs, stop, at_once, decode_dtype)
    seeds = sample_seeds(seed, batch, first_sample, var.device)
    if state is not None and not log_probs:  # all arguments were checked; those of a part of the tokens are of no use
        state.log_probs = state.sampled_log_probs = None
    drawn = None
    if surveyed is not None:
        drawn = replay(var, surveyed, start, seeds, options, at_first=graphs is True)
    if drawn is None:
        drawn = draw(var, start.state(var), seeds, options)
    images = decoded(var, drawn.feature_map, decode_dtype) if decode and not at_once else drawn.images
    return Generation(drawn.tokens, images, drawn.log_probs, drawn.sampled_log_probs, drawn.state)


class Beginning(NamedTuple):
    """What a call without a state starts from.

    Attributes:
        labels: as `VAR.indices` answers them.
        subject, guided, log_probs: see `generate`.
    """

    labels: torch.Tensor
    subject: torch.Tensor | None
    guided: bool
    log_probs: bool

    @property
    def scale(self) -> int:
        return 0

    @property
    def batch(self) -> int:
        return self.labels.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Beginning:
        """One of `function` of each tensor."""
        subject = None if self.subject is None else function(self.subject)
        return self._replace(labels=function(self.labels), subject=subject)

    def state(self, var: VAR) -> SamplingState:
        """Before the first scale."""
        return _start(var, *self)


def _start(
    var: VAR, labels: torch.Tensor, subject: torch.Tensor | None, guided: bool, log_probs: bool
) -> SamplingState:
    condition = var.condition(labels)
    batch = condition.shape[0]
    if guided:
        condition = torch.cat([condition, var.no_condition(batch)])
    weight = var.head.weight
    dtype = torch.get_autocast_dtype(weight.device.type) if _autocast(weight) else weight.dtype
    config = var.config
    cache = KVCache(
        config.depth,
        condition.shape[0],
        0,  # generate reserves what it fills
        config.num_heads,
        config.head_dim,
        dtype=dtype,
        device=weight.device,
    )
    if subject is not None:
        if (subject.shape[0] == 0) != (batch == 0) or (batch and batch % subject.shape[0]):
            raise ValueError(
                f"generate: subject: expected a number of rows that divides {batch}, got {subject.shape[0]}"
            )
        prefix = var.prefill(subject)
        cache.prefix = _without_subject(prefix) if guided else prefix
    feature_map = torch.zeros(
        batch,
        config.code_channels,
        *var.schedule.finest,
        device=weight.device,
        dtype=torch.promote_types(var.tokenizer.codebook.dtype, torch.float32),
    )
    nothing = feature_map.new_zeros(batch, 0) if log_probs else None
    return SamplingState(
        0,
        torch.empty(batch, 0, dtype=torch.int64, device=weight.device),
        feature_map,
        None,
        condition,
        var.modulations(condition),
        cache,
        0,
        nothing,
        nothing,
    )


def _autocast(weight: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(weight.device.type)


def _without_subject(prefix: list[PrefixKV]) -> list[PrefixKV]:
    """The prefix of guided rows: the unconditional half gets copies of the rows, of which no token is valid."""
    rows, tokens = prefix[0].k.shape[:2]
    lengths = torch.zeros(2 * rows, dtype=torch.int32, device=prefix[0].k.device)
    lengths[:rows] = tokens
    return [PrefixKV(torch.cat([k, k]), torch.cat([v, v]), lengths) for k, v, _ in prefix]
