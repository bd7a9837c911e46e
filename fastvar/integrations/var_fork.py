"""Forks whose methods take further arguments than those of the public code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter
from typing import Any


def fits(former: Callable[..., Any], expected: Sequence[str]) -> bool:
    """Whether a bound method takes the expected arguments, and after them none but such as have defaults."""
    parameters = list(inspect.signature(former).parameters.values())
    first, further = parameters[: len(expected)], parameters[len(expected) :]
    return [each.name for each in first] == list(expected) and all(_has_default(each) for each in further)


def following(function: Callable[..., Any], former: Callable[..., Any]) -> Callable[..., Any]:
    """A function in place of a bound method, with its defaults, that may take further arguments: a call that gives one
    of these another value than its default is the former method's, with all of its arguments."""
    signature = inspect.signature(former)
    parameters = list(signature.parameters.values())
    expected = list(inspect.signature(function).parameters.values())[1:]  # without self
    further = parameters[len(expected) :]
    if [each.default for each in parameters] == [each.default for each in expected]:
        return function

    @wraps(function)
    def method(self: Any, *args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        if any(not _same(bound.arguments.pop(each.name), each.default) for each in further):
            return self._fastvar.former[function.__name__](*args, **named)
        return function(self, **bound.arguments)

    return method


def _has_default(parameter: Parameter) -> bool:
    return parameter.default is not Parameter.empty


def _same(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, int | float | str) and type(value) is type(default) and value == default
    )
