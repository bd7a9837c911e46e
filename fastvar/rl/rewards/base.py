"""What a reward is, how it is found by name, and how several are summed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

import torch

from fastvar.builtin import REWARDS
from fastvar.statistics import centred


class Reward(NamedTuple):
    """What a reward says of B images.

    Attributes:
        scores: (B,) floating; NaN (or infinite) where it has nothing to say.
        mask: (B, H, W) bool in image pixels, where in the image the score was decided; None for everywhere.
    """

    scores: torch.Tensor
    mask: torch.Tensor | None = None


class Description(NamedTuple):
    """What a reward is, as reports state it.

    Attributes:
        weights: the networks and their weights; "none" without any.
        preprocessing: what is done with an image first.
        range: of the scores.
        memory: bytes of the weights on their device.
    """

    weights: str = "not said"
    preprocessing: str = "not said"
    range: str = "not said"
    memory: int = 0


class RewardFunction(Protocol):
    """A callable that scores images."""

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None
    ) -> Reward | torch.Tensor:
        """Score images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: (B,) what each image should show.
            references: (B, 3, H, W) in [0, 1], the reference subjects, or None.

        Returns:
            a `Reward`, or its scores (B,) alone.

        A reward may also have a method `check_texts(texts)` that raises a ValueError for a prompt which it can never
        score. It is asked about all prompts before anything is drawn. An attribute `description`, a `Description`, is
        written into reports. An attribute `concurrent` that is true says that no score depends on the other images of
        the call, and that it may be called in a thread of its own: it is then asked about a rollout's first images
        while the next ones are drawn.
        """


def description_of(scorer: Any, default: Description = Description()) -> Description:  # noqa: B008
    """What a reward or a reader says of itself, or else the default. What goes wrong in saying it is raised: `getattr`
    would take an AttributeError within a property for its absence."""
    return scorer.description if "description" in dir(scorer) else default


def plain_options(scorer: Any) -> dict[str, Any]:
    """What tells a reward or a reader from another one of its class: plain public attributes."""
    plain = (bool, int, float, str, tuple, list)
    return {
        option: value
        for option, value in getattr(scorer, "__dict__", {}).items()
        if not option.startswith("_") and isinstance(value, plain)
    }


_REGISTRY: dict[str, Callable[..., RewardFunction]] = {}


def register(name: str) -> Callable[[Any], Any]:
    """Decorator: make a reward known under a name; what it decorates is called with the reward's options."""

    def keep(factory: Any) -> Any:
        if name in available():
            raise ValueError(f"register: name: expected a new one, got {name!r}")
        _REGISTRY[name] = factory
        return factory

    return keep


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(sorted({*_REGISTRY, *REWARDS}))


def create(name: str, **options: Any) -> RewardFunction:
    """A reward by its name.

    Raises:
        ValueError: an unknown name, options that the reward does not have or lacks.
    """
    check_options(name, options)
    return _factory(name)(**options)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Whether `create` knows a name and its options, without loading anything; errors as there."""
    if name not in available():
        raise ValueError(f"create: name: expected one of {available()}, got {name!r}")
    try:
        inspect.signature(_factory(name)).bind(**options)
    except TypeError as error:
        raise ValueError(f"create: options of {name!r}: {error}") from None


def _factory(name: str) -> Callable[..., RewardFunction]:
    return resolve_name(REWARDS[name]) if name in REWARDS else _REGISTRY[name]


class RewardSum:
    """The weighted sum of rewards.

    Args:
        rewards: by name; any callables of the protocol.
        weights: by name, 1 by default.
        standardise: divide each reward's deviation from the batch's mean by the batch's standard deviation first, so
            that weights compare like with like.
        held_out: by name, rewards that evaluations ask too and nothing learns from: where the sum rises and they fall,
            the sum is being exploited.

    Raises:
        ValueError: no reward, a weight for an unknown one or one that is not finite, a held-out one that is in the sum.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFunction],
        weights: Mapping[str, float] | None = None,
        *,
        standardise: bool = False,
        held_out: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("RewardSum: rewards: expected at least one, got none")
        self.held_out = dict(held_out or {})
        twice = sorted(set(self.held_out) & set(rewards))
        if twice:
            raise ValueError(f"RewardSum: held_out: expected rewards that are not in the sum, got {twice}")
        taken = sorted({"return", "diversity"} & {*rewards, *self.held_out})
        if taken:
            raise ValueError(f"RewardSum: rewards: expected other names than {taken}, which metrics have")
        unknown = sorted(set(weights or {}) - set(rewards))
        if unknown:
            raise ValueError(f"RewardSum: weights: expected names out of {tuple(rewards)}, got {unknown}")
        for name, weight in (weights or {}).items():
            if not math.isfinite(weight):
                raise ValueError(f"RewardSum: weights: expected finite numbers, got {weight} for {name!r}")
        self.rewards = dict(rewards)
        self.weights = {name: 1.0 for name in rewards} | dict(weights or {})
        self.standardise = standardise

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None = None) -> Reward:
        """The sum and its mask; arguments and errors as `ask` and `check`."""
        each, mask = self.ask(images, prompts, references)
        self.check(each)
        return Reward(self.combine(each), mask)

    @torch.no_grad()
    def ask(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        references: torch.Tensor | None = None,
        *,
        held_out: bool = False,
        known: Mapping[str, Reward] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Each reward's own scores (B,) float64, unweighted, and their mask; arguments as `RewardFunction`. An infinite
        score is missing: NaN takes its place. With `held_out` those that are held out are asked too. Of those in
        `known`, by name, it is known what they say.

        The mask is the union of the rewards' masks, None if any reward with a weight has none: it was then decided
        everywhere.

        Raises:
            RuntimeError: names a reward that raised or answered in another shape.
        """
        mask: torch.Tensor | None = None
        everywhere = False
        each: dict[str, torch.Tensor] = {}
        for name in {**self.rewards, **(self.held_out if held_out else {})}:
            reward = (known or {}).get(name) or self.ask_one(name, images, prompts, references)
            scores = reward.scores.detach().to(images.device, torch.float64)
            each[name] = torch.where(scores.isfinite(), scores, torch.nan)
            if not self.weights.get(name):
                continue
            if reward.mask is None:
                everywhere = True
            else:
                own = reward.mask.to(images.device)
                mask = own if mask is None else mask | own
        return each, None if everywhere else mask

    @property
    def concurrent(self) -> tuple[str, ...]:
        """The names of rewards in the sum that may be asked while others are, and about parts of the images."""
        return tuple(name for name, function in self.rewards.items() if getattr(function, "concurrent", False))

    def check_texts(self, texts: Sequence[str]) -> None:
        """Before anything is drawn: ask rewards that have a method `check_texts` about all prompts.

        Raises:
            ValueError: names a reward and a text that it cannot score.
        """
        for name, function in {**self.rewards, **self.held_out}.items():
            try:
                getattr(function, "check_texts", lambda _: None)(texts)
            except ValueError as error:
                raise ValueError(f"reward {name!r}: {error}") from error

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """By name what each reward is, ready for JSON: its `Description` and its weight, None if it is held out."""
        functions = {**self.rewards, **self.held_out}
        return {
            name: {"weight": self.weights.get(name), **description_of(function)._asdict()}
            for name, function in functions.items()
        }

    def check(self, each: Mapping[str, torch.Tensor]) -> None:
        """Scores by name, of the whole batch: those of several processes are to be put together before.

        Raises:
            RuntimeError: names a reward that has no finite score at all; there is no image that all have one for.
        """
        for name, scores in each.items():
            if len(scores) and not scores.isfinite().any():
                raise RuntimeError(f"reward {name!r}: scores: expected at least one finite, got none")
        total = self.combine(each, standardise=False)
        if len(total) and not total.isfinite().any():
            raise RuntimeError(f"rewards {tuple(each)}: scores: expected an image that all score, got none")

    def combine(self, each: Mapping[str, torch.Tensor], *, standardise: bool | None = None) -> torch.Tensor:
        """The weighted sum (B,) float64 of scores by name (B,), of the whole batch as in `check`; NaN where a score is
        missing.

        Args:
            each: scores by name.
            standardise: whether to; as the sum was made by default. The mean of standardised scores is 0: to follow how
                good images are, leave it out.
        """
        standardise = self.standardise if standardise is None else standardise
        total = torch.zeros_like(next(iter(each.values())), dtype=torch.float64)
        for name, scores in each.items():
            if not self.weights.get(name):
                continue
            if standardise:
                _, deviations, spread = centred(scores[None])
                scores = torch.where(scores.isfinite(), deviations[0] / (spread[0] + 1e-6), torch.nan)
            total = total + self.weights[name] * scores.double()
        return total

    @torch.no_grad()
    def ask_one(
        self, name: str, images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None
    ) -> Reward:
        """What one reward says, its shapes checked; arguments and errors as `ask`."""
        function = self.rewards[name] if name in self.rewards else self.held_out[name]
        try:
            answer = function(images, prompts, references)
        except Exception as error:
            raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
        reward = answer if isinstance(answer, Reward) else Reward(answer)
        count = len(images)
        size = (count, *images.shape[-2:])
        for part, value, shape in (("scores", reward.scores, (count,)), ("mask", reward.mask, size)):
            if part == "mask" and value is None:
                continue
            if not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise RuntimeError(f"reward {name!r}: {part}: expected a tensor of shape {shape}, got {kind}")
            if tuple(value.shape) != shape:
                raise RuntimeError(f"reward {name!r}: {part}: expected shape {shape}, got {tuple(value.shape)}")
        return reward
