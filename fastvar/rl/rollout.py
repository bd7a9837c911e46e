"""Rollouts: images drawn from a policy, what they are worth, and which of their tokens are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvar.models import VAR, SamplingState
from fastvar.ops import propagate_mask
from fastvar.rl.returns import middle_returns
from fastvar.rl.rewards import RewardSum


@dataclass(frozen=True)
class RolloutOptions:
    """How images are drawn. With guidance or truncation the images come from another distribution than the policy that
    is trained, which is the model's own at this temperature; the gradient is then that of the model's own
    log-probabilities of these images, as VAR RL Done Right has it."""

    guidance: float = 0.0
    """Classifier-free guidance of the last scale; it grows linearly from 0 at the first one."""
    temperature: float = 1.0
    """Divides the logits, when drawing and when scoring."""
    top_k: int = 0
    """Keep this many codes; 0 for all."""
    top_p: float = 1.0
    """Keep the likeliest codes of this mass; 1 for all."""
    chunk: int = 64
    """Images drawn at a time, so that memory is bounded; it does not change them."""


class Rollout(NamedTuple):
    """B drawn segments, the G of a group adjacent.

    Attributes:
        prompts: (B,) texts, as the rewards got them.
        tokens: (B, L') int64, from the first scale on to the end of the segment.
        log_probs: (B, L') float32, of the tokens when they were drawn, under the model itself.
        returns: (B,) what each segment is worth: R, or V for a coarse one.
        rewards: by name, each reward's own scores of all images that were drawn (B,) or (B K,).
        images: (B, 3, H, W) or (B K, 3, H, W) in [0, 1].
        first_scale: scales before it are not trained.
        mask: (B, L') which tokens lie where the reward was decided, or None for all.
    """

    prompts: list[str]
    tokens: torch.Tensor
    log_probs: torch.Tensor
    returns: torch.Tensor
    rewards: dict[str, torch.Tensor]
    images: torch.Tensor
    first_scale: int
    mask: torch.Tensor | None


def whole_rollout(
    var: VAR,
    prompts: Sequence[str],
    reward: RewardSum,
    *,
    group_size: int,
    seed: int,
    options: RolloutOptions,
    use_mask: bool = False,
) -> Rollout:
    """G whole images for each prompt: the rollout of plain GRPO.

    Args:
        var: the policy, in evaluation mode, with a text condition.
        prompts: one text per group.
        reward: what scores the images.
        group_size: G.
        seed: of this rollout.
        options: how to draw.
        use_mask: keep the reward's mask, propagated over the scales.
    """
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    drawn = _in_chunks(len(rows), options.chunk, lambda r: _draw(var, rows[r], None, None, seed, r.start, options))
    return _scored(var, rows, drawn, reward, 0, use_mask)


def fine_rollout(
    var: VAR,
    prompts: Sequence[str],
    reward: RewardSum,
    *,
    group_size: int,
    middle: int,
    seed: int,
    options: RolloutOptions,
    use_mask: bool = False,
) -> Rollout:
    """G fine segments that continue one drawn coarse segment of each prompt; scales before `middle` are not trained.

    Args:
        middle: m, 1 to K - 1; the coarse segment is the scales before it. Others as `whole_rollout`.
    """
    _check_middle(var, middle)
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    trunks = max(options.chunk // group_size, 1)

    def continued(r: slice) -> _Drawn:
        coarse = _draw(var, list(prompts[r]), None, middle, seed, r.start, options)
        assert coarse.state is not None
        return _draw(var, None, coarse.state.fork(group_size), None, seed + 1, r.start * group_size, options)

    drawn = _in_chunks(len(prompts), trunks, continued)
    return _scored(var, rows, drawn, reward, middle, use_mask)


def coarse_rollout(
    var: VAR,
    prompts: Sequence[str],
    reward: RewardSum,
    *,
    group_size: int,
    middle: int,
    continuations: int,
    eta: float,
    seed: int,
    options: RolloutOptions,
    use_mask: bool = False,
) -> Rollout:
    """G coarse segments for each prompt, each worth the soft value of K continuations that fork its cached state.

    Args:
        middle: m, 1 to K - 1; the coarse segment is the scales before it.
        continuations: K.
        eta: temperature of `middle_returns`. Others as `whole_rollout`.
    """
    _check_middle(var, middle)
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    ends: list[_Drawn] = []

    def started(r: slice) -> _Drawn:
        coarse = _draw(var, rows[r], None, middle, seed, r.start, options)
        assert coarse.state is not None
        forked = coarse.state.fork(continuations)
        ends.append(_draw(var, None, forked, None, seed + 1, r.start * continuations, options))
        return coarse._replace(state=None)  # the cache is not needed any more

    coarse = _in_chunks(len(rows), max(options.chunk // continuations, 1), started)
    whole = _joined(ends)
    assert whole.images is not None
    found, each = reward(whole.images, [row for row in rows for _ in range(continuations)])
    returns = middle_returns(found.scores, continuations, eta=eta)
    mask = None
    if use_mask and found.mask is not None:  # a token matters if it does for any of its continuations
        tokens = _token_mask(var, found.mask)[:, : coarse.tokens.shape[1]]
        mask = tokens.view(len(rows), continuations, -1).any(1)
    return Rollout(rows, coarse.tokens, coarse.log_probs, returns, each, whole.images, 0, mask)


class _Drawn(NamedTuple):
    tokens: torch.Tensor
    log_probs: torch.Tensor
    images: torch.Tensor | None
    state: SamplingState | None


def _draw(
    var: VAR,
    labels: list[str] | None,
    state: SamplingState | None,
    stop: int | None,
    seed: int,
    first_sample: int,
    options: RolloutOptions,
) -> _Drawn:
    out = var.generate(
        labels,
        state=state,
        stop=stop,
        seed=seed,
        first_sample=first_sample,
        guidance=options.guidance,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        log_probs=True,
        decode=stop is None,
    )
    assert out.log_probs is not None
    return _Drawn(out.tokens, out.log_probs, out.images, out.state)


def _in_chunks(count: int, chunk: int, draw: Callable[[slice], _Drawn]) -> _Drawn:
    return _joined([draw(slice(i, min(i + chunk, count))) for i in range(0, count, chunk)])


def _joined(parts: list[_Drawn]) -> _Drawn:
    images = [part.images for part in parts if part.images is not None]
    tokens, log_probs = torch.cat([p.tokens for p in parts]), torch.cat([p.log_probs for p in parts])
    return _Drawn(tokens, log_probs, torch.cat(images) if images else None, None)


def _scored(var: VAR, rows: list[str], drawn: _Drawn, reward: RewardSum, first_scale: int, use_mask: bool) -> Rollout:
    assert drawn.images is not None
    found, each = reward(drawn.images, rows)
    mask = _token_mask(var, found.mask) if use_mask and found.mask is not None else None
    return Rollout(rows, drawn.tokens, drawn.log_probs, found.scores, each, drawn.images, first_scale, mask)


def _token_mask(var: VAR, mask: torch.Tensor) -> torch.Tensor:
    """From image pixels (B, H, W) to the tokens of all scales (B, L): a token is on if a pixel below it is."""
    finest = F.adaptive_max_pool2d(mask.float()[:, None], var.schedule.finest)[:, 0] > 0
    return propagate_mask(finest, var.schedule)


def _check_middle(var: VAR, middle: int) -> None:
    if not 1 <= middle < len(var.schedule):
        raise ValueError(f"rollout: middle: expected 1 to {len(var.schedule) - 1}, got {middle}")
