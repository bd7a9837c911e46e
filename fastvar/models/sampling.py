"""Sampling of a next-scale model: the subject's prefix once, then scale after scale on a preallocated cache; forks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fastvar.models import graphs as _graphs
from fastvar.models.kv_cache import KVCache
from fastvar.models.next_scale import Mixture, Model
from fastvar.models.var_block import Modulations
from fastvar.ops import PrefixKV, SampledTokens
from fastvar.pictures import image_grid, png
from fastvar.profiling import annotate
from fastvar.ranges import (
    PROBABILITY,
    TEMPERATURE,
    TRUNCATION,
    Count,
    CountOrNone,
    GuidanceOrNone,
    Range,
    ShareAboveZero,
    Temperature,
    check_fields,
)
from fastvar.schedule import ScaleSchedule

if TYPE_CHECKING:
    from PIL.Image import Image

DECODED_AT_ONCE = 16 * 256 * 256  # pixels of a call that are decoded within its graph
PerScale = float | Sequence[float]  # one number for all scales, or one each; an array or a tensor too


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn by rollouts, evaluations and commands; see `generate` of the model.

    With guidance or truncation they come from another distribution than the model's own at this temperature, whose
    log-probabilities reinforcement learning trains, as VAR RL Done Right has it.
    """

    guidance: GuidanceOrNone = None
    """Classifier-free guidance, one number or one for each scale; None for none. Of a VAR a single number is that of
    the last scale: it grows linearly from 0 at the first one, and 0 is none. Of an Infinity it is that of all scales,
    and 1 is none (0 draws without a look at the text)."""
    temperature: Temperature = 1.0
    """Divides the logits, when drawing and when scoring; below 1 the likeliest codes gain."""
    top_k: CountOrNone = 0
    """Keep this many codes; 0 for all."""
    top_p: ShareAboveZero = 1.0
    """Keep the likeliest codes of this mass; 1 for all."""
    batch_size: Count = 64
    """Images drawn at a time; it changes nothing but memory and speed."""
    decode_tile: CountOrNone = 0
    """Decode in tiles of so many cells of the feature map a side, where memory is short; 0 for the whole at once."""
    graphs: bool = True
    """Draw by CUDA graphs where they can be used: on a GPU, not with FSDP. They hold up to 15 % of the GPU's memory
    (`fastvar.models.graphs.MEMORY`) during updates of training too: where one runs out of memory, set this to False, or
    call `fastvar.models.clear_graphs` before it."""

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense."""
        check_fields(self)

    def guidance_of(self, model: Model | type[Model]) -> PerScale:
        """The guidance that a model draws with."""
        return model.no_guidance if self.guidance is None else self.guidance

    def guides(self, model: Model | type[Model]) -> bool:
        """Whether a model draws with unconditional rows beside the conditional ones."""
        guidance = self.guidance_of(model)
        each = guidance if isinstance(guidance, Sequence) else (guidance,)
        return any(weight != model.no_guidance for weight in each)

    def arguments(self, model: Model) -> dict[str, Any]:
        """As `generate` of a model takes them."""
        return {
            "guidance": self.guidance_of(model),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "decode_tile": self.decode_tile or None,
            "graphs": None if self.graphs else False,
        }


@dataclass
class SamplingState:
    """A set of partly sampled images, at the start of scale `scale`.

    Attributes:
        schedule: the grids.
        scale: the next scale to sample, 0 to K.
        tokens: sampled so far, (B, e_scale) int64, or bits (B, e_scale, d) bool.
        feature_map: (B, c, h, w) of the scales sampled so far.
        inputs: (B, n, c) of the next scale; None at scale 0 and after the last scale.
        condition: (R, ...) as `NextScaleModel.begin` answers it; R = B, or 2 B with guidance.
        modulations: of these rows.
        cache: keys and values of these rows.
        cached: how many of the sampled tokens lie in the cache's own rows, not in its trunk.
        log_probs, sampled_log_probs: (B, e_scale) as `fastvar.ops.SampledTokens`, or None.
        guidance_layer: guidance mixes the hidden states after block depth - guidance_layer; 0: the logits.
    """

    schedule: ScaleSchedule
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
    guidance_layer: int = 0

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def guided(self) -> bool:
        """Whether the state has unconditional rows."""
        return self.condition.shape[0] != self.tokens.shape[0]

    @property
    def kind(self) -> Hashable:
        """What decides, besides shapes, what is done with it."""
        cache = self.cache
        fixed = (self.schedule, self.scale, self.cached, self.guidance_layer)
        return *fixed, self.log_probs is None, cache.prefix is None, cache.trunk is None

    def begun(self, model: Model) -> SamplingState:
        """Itself."""
        return self

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SamplingState:
        """A state of `function` of each of this one's tensors, always in the same order; of its cache only what is
        filled."""
        fields = {name: value for name, value in vars(self).items() if name != "cache"}
        return replace(self, cache=self.cache.map(function), **tree_map_only(torch.Tensor, function, fields))

    def fork(self, times: int) -> SamplingState:
        """`times` continuations of every image: row b of the new state continues image b // times.

        The cached keys and values are shared, nothing is recomputed. Continue with
        `model.generate(state=state.fork(times), seed=...)`.

        Args:
            times: continuations per image, at least 1.
        """
        if times < 1:
            raise ValueError(f"SamplingState.fork: times: expected at least 1, got {times}")

        def repeated(rows: torch.Tensor) -> torch.Tensor:
            return rows.repeat_interleave(times, 0)

        names = ("tokens", "feature_map", "inputs", "condition", "log_probs", "sampled_log_probs")
        rows: dict[str, Any] = {name: getattr(self, name) for name in names}
        rows = {name: None if own is None else repeated(own) for name, own in rows.items()}
        forks = self.cache.fork(times)
        return replace(self, modulations=self.modulations.map(repeated), cache=forks, cached=0, **rows)


class Beginning(NamedTuple):
    """What a call without a state starts from.

    Attributes:
        prompts: as `NextScaleModel.encode` answers them.
        batch: B, of them.
        schedule, subject, guided, log_probs, guidance_layer: see `generate`.
    """

    prompts: Any
    batch: int
    schedule: ScaleSchedule
    subject: torch.Tensor | None
    guided: bool
    log_probs: bool
    guidance_layer: int = 0

    @property
    def scale(self) -> int:
        return 0

    @property
    def kind(self) -> Hashable:
        """What decides, besides shapes, what is done with it."""
        return tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(self))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Beginning:
        """One of `function` of each tensor."""
        mapped: Beginning = tree_map_only(torch.Tensor, function, self)
        return mapped

    def begun(self, model: Model) -> SamplingState:
        """The state before the first scale."""
        condition, modulations = model.begin(self.prompts, guided=self.guided)
        config, weight = model.config, model.head.weight
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        heads = (config.num_heads, config.head_dim)
        cache = KVCache(config.depth, len(condition), 0, *heads, dtype=dtype, device=device)  # reserved when it fills
        if self.subject is not None:
            prefix = model.prefill(self.subject, schedule=self.schedule)
            cache.prefix = _without_subject(prefix) if self.guided else prefix
        feature_map = model.tokenizer.empty_feature_map(self.batch, self.schedule)
        nothing = feature_map.new_zeros(self.batch, 0) if self.log_probs else None
        return SamplingState(
            schedule=self.schedule,
            scale=0,
            tokens=model.empty_tokens(self.batch),
            feature_map=feature_map,
            inputs=None,
            condition=condition,
            modulations=modulations,
            cache=cache,
            cached=0,
            log_probs=nothing,
            sampled_log_probs=nothing,
            guidance_layer=self.guidance_layer,
        )


def _without_subject(prefix: list[PrefixKV]) -> list[PrefixKV]:
    """The prefix of guided rows: the unconditional half gets copies of the rows, of which no token is valid."""
    rows, tokens = prefix[0].k.shape[:2]
    lengths = torch.zeros(2 * rows, dtype=torch.int32, device=prefix[0].k.device)
    lengths[:rows] = tokens
    return [PrefixKV(torch.cat([k, k]), torch.cat([v, v]), lengths) for k, v, _ in prefix]


class Generation(NamedTuple):
    """What `generate` answers.

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


def per_scale(
    name: str, value: Any, num_scales: int, allowed: Range, *, whole: bool = False, expected: str = "{}"
) -> tuple[Any, ...]:
    """A number for each scale: one number for all, or a sequence, array or tensor of as many as there are scales.

    Args:
        name: of the argument of `generate`.
        value: what was given.
        num_scales: K.
        allowed: what each may be.
        whole: whether they are to be integers.
        expected: how the error names the range.

    Raises:
        ValueError: anything else, another number of them, or one that is not allowed.
    """
    if hasattr(value, "tolist"):  # an array's or a tensor's
        value = value.tolist()
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * num_scales
    kind, each = (Integral, "an integer") if whole else (Real, "a number")
    if not all(isinstance(number, kind) for number in numbers):
        raise ValueError(f"generate: {name}: expected {each} or {num_scales} of them, got {value!r}")
    if len(numbers) != num_scales:
        raise ValueError(f"generate: {name}: expected {each} or {num_scales} of them, got {len(numbers)}")
    for number in numbers:
        problem = allowed.problem(number)
        if problem is not None:
            raise ValueError(f"generate: {name}: expected {expected.format(problem)}, got {number}")
    return tuple(int(number) if whole else float(number) for number in numbers)


class ScaleOptions(NamedTuple):
    """How the scales of a call are sampled; see `generate`.

    Attributes:
        guidance, temperature, top_k, top_p: one a scale.
        stop: the scale to stop before.
        decode: whether to decode the feature map in one go with sampling.
        decode_dtype, decode_tile: what to decode in, and in tiles of what size.
    """

    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    log_probs: bool
    stop: int
    decode: bool
    decode_dtype: torch.dtype | None
    decode_tile: int | None


class Drawn(NamedTuple):
    """What a call has sampled: `Generation` with images only if they were decoded at once, and the feature map only if
    they were not."""

    tokens: torch.Tensor
    feature_map: torch.Tensor | None
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


def draw(model: Model, start: Beginning | SamplingState, seeds: torch.Tensor, options: ScaleOptions) -> Drawn:
    """Sample to `options.stop` and decode; a state is carried on. Nothing waits for the device."""
    state = start.begun(model)
    sample_scales(model, state, seeds, options)
    images = decoded(model, state.feature_map, options) if options.decode else None
    return Drawn(
        state.tokens,
        state.feature_map if images is None else None,
        images,
        state.log_probs,
        state.sampled_log_probs,
        state if options.stop < len(state.schedule) else None,
    )


def decoded(model: Model, feature_map: torch.Tensor, options: ScaleOptions) -> torch.Tensor:
    """Feature map (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""
    images = model.tokenizer.decode_features(feature_map, dtype=options.decode_dtype, tile=options.decode_tile)
    return images.float().clamp(-1, 1).add(1).mul(0.5)


def sample_scales(model: Model, state: SamplingState, seeds: torch.Tensor, options: ScaleOptions) -> None:
    """Sample the scales from `state.scale` to `options.stop`; the state is carried on. Nothing waits for the device.

    Args:
        model: what draws.
        state: of B images.
        seeds: (B,) int64, see `sample_seeds`.
        options: how.
    """

    def drawn(k: int, hidden: torch.Tensor) -> SampledTokens:
        logits, guidance = model.logits(hidden), options.guidance[k]
        contrasted = len(logits) > state.batch and guidance != model.no_guidance
        return model.sample(
            logits[: state.batch],
            unconditional=logits[state.batch :] if contrasted else None,
            guidance=guidance - model.no_guidance if contrasted else 0.0,
            temperature=options.temperature[k],
            top_k=options.top_k[k],
            top_p=options.top_p[k],
            seeds=seeds,
            position=state.schedule.starts[k],
            log_probs=options.log_probs,
        )

    _pass_scales(model, state, options.stop, options.guidance, drawn)


@torch.no_grad()
def state_after(
    model: Model, prompts: Any, tokens: torch.Tensor, *, subject: torch.Tensor | None = None, guided: bool = False
) -> SamplingState:
    """The state of a model that is as if it had sampled the first scales itself, whoever has; to be forked and
    continued. It has no log-probabilities.

    Args:
        model: in evaluation mode.
        prompts: B, as its `generate` takes them.
        tokens: (B, L'), or bits (B, L', d), of the first scales.
        subject: (B / G, L, c) pyramids of the reference subjects, or None.
        guided: whether it is to be continued with guidance.

    Raises:
        ValueError: prompts of another kind or number, tokens that do not end with a scale.
    """
    encoded, stop = model.encode(prompts), len(model.schedule.with_num_tokens(tokens.shape[1]))
    if model.count(encoded) != len(tokens):
        raise ValueError(f"state_after: prompts: expected one for each of {len(tokens)}, got {model.count(encoded)}")
    if subject is not None:
        model.check_subject("state_after", subject, len(tokens))
    state = Beginning(encoded, len(tokens), model.schedule, subject, guided, log_probs=False).begun(model)

    def given(k: int, hidden: torch.Tensor) -> SampledTokens:
        return SampledTokens(tokens[:, state.schedule.starts[k] : state.schedule.ends[k]], None, None)

    _pass_scales(model, state, stop, (model.no_guidance,) * stop, given)
    return state


def _pass_scales(
    model: Model,
    state: SamplingState,
    stop: int,
    guidance: Sequence[float],
    draw: Callable[[int, torch.Tensor], SampledTokens],
) -> None:
    """Pass the scales from `state.scale` to `stop` through the model; `draw` says what tokens a scale's hidden states
    give. `guidance` is read where the state mixes hidden states."""
    schedule = state.schedule
    # a state that stops early has no room for the rest: as a trunk of forks it would stay empty
    state.cache.reserve(state.cached + schedule.ends[stop - 1] - schedule.starts[state.scale])
    positions = model.token_positions(schedule)
    by_scale = model.injection(schedule).by_scale
    scales: list[SampledTokens] = []
    for k in range(state.scale, stop):
        with annotate(f"scale {k}"):
            start, end = schedule.starts[k], schedule.ends[k]
            inputs = state.inputs
            if state.guided and inputs is not None:
                inputs = torch.cat([inputs, inputs])
            mixture = None
            if state.guided and state.guidance_layer:
                mixture = Mixture(len(model.blocks) - state.guidance_layer, guidance[k])
            hidden = model.sample_scale(
                model.embed(state.condition, inputs, start, positions.added),
                state.modulations,
                state.cache,
                position=state.cached,
                end=state.cached + schedule.lengths[k],
                rope=positions.rope_of(start, end),
                mixture=mixture,
                prefix_tokens=end if by_scale else None,
            )
            drawn = draw(k, hidden)
            state.feature_map, state.inputs = model.tokenizer.accumulate(
                drawn.tokens, state.feature_map, k, schedule=schedule
            )
            scales.append(drawn)
            state.cached += schedule.lengths[k]
            state.scale = k + 1
    for name in ("tokens", "log_probs", "sampled_log_probs"):
        before = getattr(state, name)
        if before is not None:
            setattr(state, name, torch.cat([before, *(getattr(drawn, name) for drawn in scales)], 1))


@torch.no_grad()
def generate(
    model: Model,
    prompts: Any,
    state: SamplingState | None,
    *,
    name: str,
    against: Any = None,
    subject: torch.Tensor | None,
    schedule: ScaleSchedule,
    guidance: PerScale,
    guidance_layer: int = 0,
    temperature: PerScale,
    top_k: int | Sequence[int],
    top_p: PerScale,
    seed: int,
    first_sample: int,
    stop: int | None,
    log_probs: bool,
    decode: bool,
    decode_dtype: torch.dtype | None,
    decode_tile: int | None,
    graphs: bool | None,
) -> Generation:
    """Sample images for prompts, or continue a state: the checks and the work of every model's `generate`, which says
    what the arguments are.

    Args:
        model: what draws.
        prompts: as its `encode` takes them; None with a state.
        state: to be continued, or None.
        name: of the prompts, for errors.
        against: prompts to keep away from; None for those that say nothing.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    if (prompts is None) == (state is None):
        raise ValueError(f"generate: {name}, state: expected exactly one of them")
    scales, none = len(schedule), model.no_guidance
    weights = per_scale("guidance", guidance, scales, model.guidance_range)
    likeliest = "{} (for the likeliest one top_k=1)"
    temperatures = per_scale("temperature", temperature, scales, TEMPERATURE, expected=likeliest)
    top_ks = per_scale("top_k", top_k, scales, TRUNCATION, whole=True)
    top_ps = per_scale("top_p", top_p, scales, PROBABILITY, expected="a probability from {}")
    first = 0 if state is None else state.scale
    if state is not None and subject is not None:
        raise ValueError("generate: subject: expected None with a state, which has its own")
    if first == scales:
        raise ValueError(
            "generate: state: expected one that is not finished; it was continued before (fork it to keep it)"
        )
    stop = scales if stop is None else stop
    if not first < stop <= scales:
        raise ValueError(f"generate: stop: expected {first + 1} to {scales}, got {stop}")
    start: SamplingState | Beginning
    if state is None:
        guided = any(weight != none for weight in weights)
        encoded = model.encode(prompts, against if guided else None)
        batch = model.count(encoded)
        if subject is not None:
            model.check_subject("generate", subject, batch)
        start = Beginning(encoded, batch, schedule, subject, guided, log_probs, guidance_layer)
    else:
        start, batch = state, state.batch
        if any(weight != none for weight in weights[first:stop]) and not state.guided and batch:
            raise ValueError(f"generate: guidance: expected {none:g}, the state was sampled without guidance")
        if log_probs and state.log_probs is None:
            raise ValueError("generate: log_probs: expected False, the state was sampled without log-probabilities")
    if decode_tile is not None and decode_tile < 1:
        raise ValueError(f"generate: decode_tile: expected at least 1, got {decode_tile}")
    if decode_dtype is None and model.head.weight.dtype == torch.bfloat16:
        decode_dtype = torch.bfloat16
    surveyed = None if graphs is False else _graphs.survey(model, must=graphs is True)
    surveyed = surveyed if batch else None
    # the launches of many images are hidden behind their sampling, and their activations are large
    pixels = batch * math.prod(model.tokenizer.config.image_size_of(schedule))
    at_once = decode and (surveyed is None or pixels <= DECODED_AT_ONCE)
    options = ScaleOptions(weights, temperatures, top_ks, top_ps, log_probs, stop, at_once, decode_dtype, decode_tile)
    seeds = sample_seeds(seed, batch, first_sample, model.device)
    if state is not None and not log_probs:  # all arguments were checked; those of a part of the tokens are of no use
        state.log_probs = state.sampled_log_probs = None
    drawn: Drawn | None = None
    if surveyed is not None:
        drawn = _graphs.replay(model, surveyed, start, seeds, options, draw, at_first=graphs is True)
        if drawn is not None and state is not None:
            vars(state).update(vars(drawn.state) if drawn.state is not None else {"scale": stop})
            drawn = drawn._replace(state=None if drawn.state is None else state)
    if drawn is None:
        drawn = draw(model, start, seeds, options)
    images = drawn.images
    if decode and images is None:
        assert drawn.feature_map is not None
        images = decoded(model, drawn.feature_map, options)
    return Generation(drawn.tokens, images, drawn.log_probs, drawn.sampled_log_probs, drawn.state)
