"""A function of somebody else's with a wrong line put right."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any


def corrected(function: Any, wrong: str, right: str) -> FunctionType | None:
    """A method's function compiled anew of its text in which `right` stands for `wrong`; None if that is not to be had:
    it is wrapped, uses names of an outer function, or its text, as it is now, is not that of what runs. The function
    itself if it has no such line.

    Globals and defaults are the function's own, its decorators are not called again, and what it raises is shown with
    lines of its own file.
    """
    if not isinstance(function, FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
        text = "".join(lines)
        if wrong not in text:
            return function
        same, code = (_compiled(function, each, first) for each in (text, text.replace(wrong, right)))
    except (OSError, SyntaxError, StopIteration):
        return None
    if _known_by(same) != _known_by(function.__code__):
        return None
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    return made


def _known_by(code: CodeType) -> tuple[Any, ...]:
    """Not by its instructions, which depend on what else its file imports."""
    return code.co_consts, code.co_names, code.co_varnames, code.co_firstlineno


def _compiled(function: FunctionType, text: str, first: int) -> CodeType:
    """In a class of the same name, by which names that begin with two underscores are mangled."""
    owner = function.__qualname__.split(".")[-2] if "." in function.__qualname__ else "Owner"
    tree = ast.increment_lineno(ast.parse(f"class {owner}:\n{text}"), first - 2)
    module = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True, flags=_flags(function))
    return next(code for code in _codes(module) if code.co_name == function.__name__)


def _flags(function: FunctionType) -> int:
    """Of `from __future__ import annotations`, if its file has it."""
    import __future__

    return function.__code__.co_flags & __future__.annotations.compiler_flag


def _codes(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _codes(const)
