"""Sampling of a VAR: the subject's prefix once, then scale after scale on a preallocated cache; forks of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastvar.models.graphs import replay_scales
from fastvar.models.kv_cache import KVCache
from fastvar.ops import PrefixKV, accumulate_scale, sample_tokens
from fastvar.profiling import annotate

if TYPE_CHECKING:
    from fastvar.models.var import VAR, Labels
    from fastvar.models.var_block import Modulations


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
            modulations=type(self.modulations)(
                [function(block) for block in self.modulations.blocks], function(self.modulations.head)
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

        modulations = type(self.modulations)(
            [block.repeat_interleave(times, 0) for block in self.modulations.blocks],
            self.modulations.head.repeat_interleave(times, 0),
        )
        return SamplingState(
            self.scale,
            self.tokens.repeat_interleave(times, 0),
            self.feature_map.repeat_interleave(times, 0),
            repeated(self.inputs),
            self.condition.repeat_interleave(times, 0),
            modulations,
            self.cache.fork(times),
            0,
            repeated(self.log_probs),
            repeated(self.sampled_log_probs),
        )


class Generation(NamedTuple):
    """What `VAR.generate` answers.

    Attributes:
        tokens: (B, L') int64, L' the tokens of the scales sampled.
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
    as it is.
    """
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
    """

    guidance: tuple[float, ...]
    temperature: float
    top_k: int
    top_p: float
    log_probs: bool
    stop: int


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
    for k in range(state.scale, options.stop):
        with annotate(f"scale {k}"):
            start, length, weight = schedule.starts[k], schedule.lengths[k], options.guidance[k]
            inputs = state.inputs
            if inputs is None:
                inputs = state.feature_map.new_zeros(batch, 0, var.config.code_channels)
            if state.guided:
                inputs = torch.cat([inputs, inputs])
            x = var.embed(state.condition, inputs, start)
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
            state.tokens = torch.cat([state.tokens, drawn.tokens], 1)
            if drawn.log_probs is not None and drawn.sampled_log_probs is not None:
                assert state.log_probs is not None and state.sampled_log_probs is not None
                state.log_probs = torch.cat([state.log_probs, drawn.log_probs], 1)
                state.sampled_log_probs = torch.cat([state.sampled_log_probs, drawn.sampled_log_probs], 1)
            state.cached += length
            state.scale = k + 1


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
    graphs: bool = False,
) -> Generation:
    """Sample images for labels, or continue a state.

    Args:
        var: the model; put it in evaluation mode.
        labels: (B,) class indices, or texts, or characters (B, text_length).
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
        graphs: sample by a CUDA graph, which spares the launches of a few thousand small kernels an image. The first
            call with these shapes and options captures it and takes longer than others; it keeps the memory of a cache
            until `fastvar.models.clear_graphs`. One stream at a time; not with FSDP. Not yet run on a GPU.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    schedule, tokenizer = var.schedule, var.tokenizer
    weights = guidance_per_scale(guidance, len(schedule))
    if (labels is None) == (state is None):
        raise ValueError("generate: labels, state: expected exactly one of them")
    if state is None:
        assert labels is not None
        state = _start(var, labels, subject, any(weights), log_probs)
    elif subject is not None:
        raise ValueError("generate: subject: expected None with a state, which has its own")
    if state.scale == len(schedule):
        raise ValueError(
            "generate: state: expected one that is not finished; it was continued before (fork it to keep it)"
        )
    stop = len(schedule) if stop is None else stop
    if not state.scale < stop <= len(schedule):
        raise ValueError(f"generate: stop: expected {state.scale + 1} to {len(schedule)}, got {stop}")
    batch = state.tokens.shape[0]
    if any(weights[state.scale : stop]) and not state.guided and batch:
        raise ValueError("generate: guidance: expected 0, the state was sampled without guidance")
    if graphs and not _graphs_run_on(state.feature_map.device):
        raise ValueError(f"generate: graphs: expected a model on a GPU, got one on {state.feature_map.device.type}")
    if log_probs and state.log_probs is None:
        raise ValueError("generate: log_probs: expected False, the state was sampled without log-probabilities")
    if not log_probs:  # those of a part of the tokens would be of no use
        state.log_probs = state.sampled_log_probs = None

    options = SamplingOptions(tuple(weights), temperature, top_k, top_p, log_probs, stop)
    seeds = sample_seeds(seed, batch, first_sample, var.device)
    if graphs:
        replay_scales(var, state, seeds, options, sample_scales)
    else:
        sample_scales(var, state, seeds, options)
    images = None
    if decode:
        images = tokenizer.decode_features(state.feature_map).float().clamp(-1, 1).add(1).mul(0.5)
    unfinished = state if stop < len(schedule) else None
    return Generation(state.tokens, images, state.log_probs, state.sampled_log_probs, unfinished)


def _start(var: VAR, labels: Labels, subject: torch.Tensor | None, guided: bool, log_probs: bool) -> SamplingState:
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


def _graphs_run_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _autocast(weight: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(weight.device.type)


def _without_subject(prefix: list[PrefixKV]) -> list[PrefixKV]:
    """The prefix of guided rows: the unconditional half gets copies of the rows, of which no token is valid."""
    rows, tokens = prefix[0].k.shape[:2]
    lengths = torch.tensor([tokens] * rows + [0] * rows, dtype=torch.int32, device=prefix[0].k.device)
    return [PrefixKV(torch.cat([k, k]), torch.cat([v, v]), lengths) for k, v, _ in prefix]
