"""Values of JSON and TOML as the fields of a dataclass want them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


def fitted(config_class: type, name: str, value: Any) -> Any:
    """A value for a dataclass's field: lists become tuples, 2.0 becomes 2 for a whole number.

    Raises:
        ValueError: another type than the field's.
    """
    hint = _hints(config_class)[name]
    try:
        return _fitted(hint, value)
    except (TypeError, OverflowError):
        expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None


@cache
def _hints(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class)


def _fitted(hint: Any, value: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and number and (isinstance(value, int) or (math.isfinite(value) and value == int(value))):
        return int(value)
    if hint is float and number:
        return float(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_fitted(kind, each) for kind, each in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _fitted(inner[1], each) for key, each in value.items()}
    if hint is Any:
        return value
    raise TypeError
