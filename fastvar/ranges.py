"""What the fields of a config may be: declared once, beside their types, checked and read from files in one place.

@dataclass(frozen=True)
class Config:
    steps: Count = 100
    precision: Annotated[str, OneOf("no", "bf16")] = "no"

    def check(self) -> None:
        check_fields(self)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

LARGEST = 3.4028234663852886e38  # of float32, which devices compute in: beyond it is infinity


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, finite in float32.

    Attributes:
        low, high: the ends, which belong to it.
        above: `low` does not.
        below: `high` does not.
        infinite: numbers beyond float32 and math.inf do.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False

    def problem(self, value: float) -> str | None:
        """What a number should have been; None where it is in the range. NaN is in none."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        finite = self.infinite or -LARGEST <= value <= LARGEST
        if low and high and finite:
            return None
        return str(self) if finite or value != value else f"{self} and finite"

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a number" if self.high == math.inf else f"{'below' if self.below else 'at most'} {_text(self.high)}"
        low = f"{'above' if self.above else 'at least'} {_text(self.low)}"
        if self.high == math.inf:
            return low
        if self.above or self.below:
            return f"{low} and {'below' if self.below else 'at most'} {_text(self.high)}"
        return f"{_text(self.low)} to {_text(self.high)}"


class OneOf:
    """Texts to choose from."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def problem(self, value: object) -> str | None:
        """What a value should have been; None where it is one of them."""
        return None if value in self.choices else str(self)

    def __str__(self) -> str:
        return f"one of {self.choices}"


TEMPERATURE = Range(1e-12, 1e12)  # logits are divided by it
GUIDANCE = Range(-1e12, 1e12)  # they are multiplied with it, and then divided
TRUNCATION = Range(0)  # to so many codes
PROBABILITY = Range(0, 1)

Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrInfinite = Annotated[float, Range(0, above=True, infinite=True)]
NotNegative = Annotated[float, Range(0)]
NotNegativeOrInfinite = Annotated[float, Range(0, infinite=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
Number = Annotated[float, Range()]
Temperature = Annotated[float, TEMPERATURE]
GuidanceOrNone = Annotated[float | tuple[float, ...] | None, GUIDANCE]


@cache
def declarations(config_class: Any) -> dict[str, tuple[Any, Range | OneOf | None]]:
    """By field of a dataclass: its type without annotations, and its declaration, if it has one."""
    kinds = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds[name] = kind, next((note for note in notes if isinstance(note, Range | OneOf)), None)
    return {field.name: kinds[field.name] for field in fields(config_class)}


def check_fields(config: Any, owner: str | None = None) -> None:
    """Raise a ValueError that names the first field of a dataclass that is not what it is declared to be. A dataclass
    in it is asked for its own `check()`, where it has one. The message names `owner`, by default the class."""
    config_class: Any = type(config)
    for name, (kind, allowed) in declarations(config_class).items():
        value = getattr(config, name)
        if is_dataclass(value):
            own = getattr(value, "check", None)
            own() if own is not None else check_fields(value)
        elif allowed is not None:
            check_value(owner or config_class.__name__, name, value, kind, allowed)


def check_value(owner: str, name: str, value: Any, kind: Any, allowed: Range | OneOf) -> None:
    """Raise a ValueError unless a value, or each item of a tuple, is of its kind and allowed.

    Args:
        owner, name: of the message.
        value: what was given.
        kind: int, float or str, a tuple of one of them, or several of these, None among them.
        allowed: its declaration.
    """
    if value is None and type(None) in get_args(kind):
        return
    kind = _one_of(kind, value)
    items, kinds, each = [value], (kind,), ""
    if get_origin(kind) is tuple:
        kinds, each = get_args(kind), "each "
        items = list(value) if isinstance(value, tuple | list) else [value]
        if kinds[-1] is not ... and len(items) != len(kinds):
            raise ValueError(f"{owner}: {name}: expected {len(kinds)} numbers, got {value!r}")
    for item in items:
        expected = _expected(item, kinds[0], allowed)
        if expected is not None:
            raise ValueError(f"{owner}: {name}: expected {each}{expected}, got {value!r}")


def _expected(value: Any, kind: type, allowed: Range | OneOf) -> str | None:
    """What a value should have been; None where it is."""
    number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if isinstance(allowed, Range) and not number:
        return f"{'an integer' if kind is int else 'a number'}, {allowed}"
    return allowed.problem(value)


def _one_of(kind: Any, value: Any) -> Any:
    """Of a kind with several to choose from the one of a value: a tuple for a sequence, if there is one."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    sequence = isinstance(value, tuple | list)
    return next((each for each in get_args(kind) if (get_origin(each) is tuple) == sequence), get_args(kind)[0])


def fitted(config_class: type, name: str, value: Any) -> Any:
    """A value of JSON or TOML for a dataclass's field: lists become tuples, 2.0 becomes 2 for a whole number.

    Raises:
        ValueError: another type than the field's.
    """
    kind, _ = declarations(config_class)[name]
    try:
        return _fitted(kind, value)
    except (TypeError, OverflowError):
        expected = kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None


def _fitted(kind: Any, value: Any) -> Any:
    if value is None and type(None) in get_args(kind):
        return None
    kind = _one_of(kind, value)
    origin, inner = get_origin(kind), get_args(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and number and (isinstance(value, int) or (math.isfinite(value) and value == int(value))):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_fitted(each_kind, each) for each_kind, each in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _fitted(inner[1], each) for key, each in value.items()}
    if kind is Any:
        return value
    raise TypeError


def _text(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
