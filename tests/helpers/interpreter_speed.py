"""Triton's interpreter without what it finds anew for every call of a function in a kernel: a third of its time."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from triton.language import core
from triton.runtime import interpreter


def install() -> None:
    """The builtins of a module or class are looked for once, before any of them is replaced; and the dtype in numpy of
    a dtype is looked up once."""
    names: dict[Any, list[str]] = {}
    whole = interpreter._get_np_dtype
    kept = cache(whole)

    def of_scalars(dtype: Any) -> Any:
        return kept(dtype) if type(dtype) is core.dtype else whole(dtype)  # types of blocks have no hash

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # not replaced by the function that calls this one
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = of_scalars
