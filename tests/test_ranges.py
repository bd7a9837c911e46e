"""Every number and choice of every config is declared, and what its declaration forbids is refused by name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from fastvar.cli.models import Sample, Train, TrainTokenizer
from fastvar.cli.reinforcement import RL, ChooseMiddle, Evaluate
from fastvar.cli.tune import Tune
from fastvar.handwriting.demo import DemoConfig
from fastvar.models import SamplingOptions, VARConfig, VQTokenizerConfig
from fastvar.ranges import LARGEST, OneOf, Range, check_fields, check_value, declarations, fitted
from fastvar.rl import PolicyLossOptions, RLConfig
from fastvar.training import TrainConfig

REQUIRED: dict[str, Any] = {"labels": ("1",)}


def _with_nested(config: type) -> Iterator[type]:
    yield config
    for kind, _ in declarations(config).values():
        if dataclasses.is_dataclass(kind):
            yield from _with_nested(kind)  # type: ignore[arg-type]


ROOTS = (TrainTokenizer, Train, Sample, RL, ChooseMiddle, Evaluate, Tune, DemoConfig, VARConfig, VQTokenizerConfig)
CONFIGS = list(dict.fromkeys(config for root in ROOTS for config in _with_nested(root)))


def items(kind: Any) -> tuple[Any, ...]:
    """The kinds of a tuple's items, or that of a value alone."""
    return tuple(item for item in get_args(kind) if item is not ...) if get_origin(kind) is tuple else (kind,)


def fields(config: type) -> Iterator[tuple[str, Any, Range | OneOf]]:
    """Those that are numbers or have a declaration, which all numbers need."""
    for name, (kind, allowed) in declarations(config).items():
        if allowed is not None or items(kind)[0] in (int, float):
            assert allowed is not None, f"{config.__name__}.{name} is a number without a declaration"
            yield name, kind, allowed


def made(config: type, **changes: Any) -> Any:
    """A config with defaults where it has them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind, _ = declarations(config)[field.name]
            values[field.name] = made(kind) if dataclasses.is_dataclass(kind) else REQUIRED.get(field.name, Path("x"))
    return config(**values | changes)


def check(config: Any) -> None:
    config.check() if hasattr(config, "check") else check_fields(config)


def in_a_tuple(value: Any, kind: Any) -> Any:
    """A value, or a tuple that ends with it where the kind is one."""
    return (0.5,) * (len(items(kind)) - 1) + (value,) if get_origin(kind) is tuple else value


def forbidden(kind: Any, allowed: Range | OneOf) -> Iterator[Any]:
    if type(None) in get_args(kind):
        yield from (value for value in forbidden(get_args(kind)[0], allowed) if value is not None)
        return
    if isinstance(allowed, OneOf):
        yield from ("nonsense", None, 3)
        return
    yield from (math.nan, "1", None, True)
    if kind is int:
        yield from (allowed.low - 1, 2.5, float(max(allowed.low, 2)))
    if allowed.low > -math.inf:
        yield from (-math.inf, allowed.low if allowed.above else math.nextafter(allowed.low, -math.inf))
    if allowed.high < math.inf:
        yield from (allowed.high if allowed.below else math.nextafter(allowed.high, math.inf), allowed.high * 2)
    if not allowed.infinite:
        yield from (math.inf, 1e39)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_what_is_forbidden_is_refused_by_name(config: type) -> None:
    for name, kind, allowed in fields(config):
        for value in forbidden(items(kind)[0], allowed):
            given = in_a_tuple(value, kind)
            got = re.escape(repr(given))
            with pytest.raises(ValueError, match=rf"^{config.__name__}: {name}: expected .*, got {got}$"):
                check(made(config, **{name: given}))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_defaults_and_the_ends_of_ranges_are_allowed(config: type) -> None:
    check(made(config))
    for name, kind, allowed in fields(config):
        if isinstance(allowed, Range):
            ends = [end for end, out in ((allowed.low, allowed.above), (allowed.high, allowed.below)) if not out]
            for value in (end for end in ends if allowed.infinite or math.isfinite(end)):
                check_value("C", name, in_a_tuple(value, kind), kind, allowed)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(seed=2**32), "TrainConfig: seed: expected 0 to 2147483647, got 4294967296"),
        (RLConfig(seed=2**31), "RLConfig: seed: expected 0 to 2147483647, got 2147483648"),
        (TrainConfig(weight_decay=-0.1), "TrainConfig: weight_decay: expected at least 0, got -0.1"),
        (RLConfig(weight_decay=math.nan), "RLConfig: weight_decay: expected at least 0, got nan"),
        (TrainConfig(betas=(0.9, 2.0)), r"TrainConfig: betas: expected each at least 0 and below 1, got \(0.9, 2.0\)"),
        (RLConfig(betas=(0.9,)), r"RLConfig: betas: expected 2 numbers, got \(0.9,\)"),  # type: ignore[arg-type]
        (TrainConfig(learning_rate=math.inf), "TrainConfig: learning_rate: expected above 0 and finite, got inf"),
        (
            RLConfig(rollout=SamplingOptions(guidance=math.nan)),
            "SamplingOptions: guidance: expected -1e.12 to 1e.12, got",
        ),
        (
            RLConfig(loss=PolicyLossOptions(entropy_weight=math.nan)),
            "PolicyLossOptions: entropy_weight: expected a number, got nan",
        ),
        (TrainConfig(batch_size=4, accumulate=3), "accumulate: expected a divisor of the batch size 4, got 3"),
        (RLConfig(coarse_updates=0, fine_updates=0), "coarse_updates, fine_updates: expected not both 0"),
        (RLConfig(stop_kl=0.1), "stop_kl: expected 0 without a KL weight"),
    ],
)
def test_messages(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check()


def test_infinity_where_it_means_something() -> None:
    RLConfig(
        eta=math.inf,
        tolerance=math.inf,
        clip_norm=math.inf,
        loss=PolicyLossOptions(clip_low=math.inf, clip_high=math.inf),
    ).check()
    RLConfig(eta=1e39).check()
    assert LARGEST < 1e39
    assert fitted(RLConfig, "eta", math.inf) == math.inf  # as TOML has it
    with pytest.raises(ValueError, match="eta: expected float"):
        fitted(RLConfig, "eta", 10**400)
    assert Range(high=5).problem(-math.inf) == "at most 5 and finite"


def test_none_where_it_means_something() -> None:
    SamplingOptions(guidance=None).check()
    assert fitted(SamplingOptions, "guidance", None) is None and fitted(SamplingOptions, "guidance", 2) == 2.0
    with pytest.raises(ValueError, match=r"^guidance: expected float \| tuple\[float, \.\.\.\] \| None, got '2'"):
        fitted(SamplingOptions, "guidance", "2")
    with pytest.raises(ValueError, match=r"^top_k: expected int, got None"):
        fitted(SamplingOptions, "top_k", None)


def test_a_run_of_no_guidance_goes_on_as_one_of_0() -> None:
    """Which was the default once; there were no tiles then."""
    plain = RLConfig().settings()
    assert set(plain["rollout"]) == {"guidance", "temperature", "top_k", "top_p"}
    assert RLConfig(rollout=SamplingOptions(decode_tile=8)).settings()["rollout"]["decode_tile"] == 8
    assert plain == RLConfig(rollout=SamplingOptions(guidance=0.0)).settings() and plain["rollout"]["guidance"] == 0
    assert plain != RLConfig(rollout=SamplingOptions(guidance=1.0)).settings()


def test_a_config_without_declarations_of_its_own_checks_what_is_in_it() -> None:
    @dataclasses.dataclass
    class Outer:
        inner: Any = dataclasses.field(default_factory=lambda: SamplingOptions(batch_size=0))

    with pytest.raises(ValueError, match="SamplingOptions: batch_size: expected at least 1, got 0"):
        check_fields(Outer())
