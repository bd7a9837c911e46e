"""Samplers of the public code, which draw by a function that their module knows by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

from fastvar.integrations.patching import Applied, Left, Replaced
from fastvar.ops import sample_bits, sample_tokens

_PREFIX = "sample_with_top_k_top_p_"


def replace(applied: Applied, place: str, found: Any) -> None:
    """Let the methods of an object that draw do it without a sort, bits in closed form.

    What runs is a copy of the method with names of its own, among them our function; other models of the module draw as
    ever, in other threads too.
    """
    kind = type(found)
    for name, drawn_by in _methods_that_draw(kind):  # type: ignore[arg-type]  # a class is hashable
        try:
            drawing = _drawing(getattr(kind, name), drawn_by)
        except ValueError as error:
            applied.left.append(Left("sampler", place, kind.__name__, str(error)))
            continue
        if name == "__call__":  # which Python looks for in the class
            applied.set(found, "__class__", type(kind.__name__, (kind,), {name: drawing}))
        else:
            applied.set(found, name, MethodType(drawing, found))
        what, note = f"{name} draws without a sort, bits in closed form", "equal seeds draw other images than before"
        applied.replaced.append(Replaced("sampler", place, kind.__name__, what, note))


@cache
def _methods_that_draw(kind: type) -> list[tuple[str, str]]:
    """Names of methods of a class, and of the function that each draws by."""
    found = []
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        inner = inspect.unwrap(method)
        names = [each for each in inner.__code__.co_names if each.startswith(_PREFIX) and each in inner.__globals__]
        found += [(name, each) for each in names[:1]]
    return found


def _drawing(method: Callable[..., Any], drawn_by: str) -> Callable[..., Any]:
    inner: Any = inspect.unwrap(method)
    former = inner.__globals__[drawn_by]
    _with_names(method, inner.__globals__)  # whether it can be copied

    def draw(
        logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0.0, rng: Any = None, num_samples: int = 1
    ) -> torch.Tensor:
        if num_samples != 1:
            return former(logits_BlV, top_k=top_k, top_p=top_p, rng=rng, num_samples=num_samples)
        return sample(logits_BlV, top_k, top_p, rng)

    @wraps(method)
    def drawing(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(self, *args, **kwargs)
        given.apply_defaults()
        # smoothing reads the logits that the former function has truncated in place
        if given.arguments.get("more_smooth"):
            return method(self, *args, **kwargs)
        return _with_names(method, {**inner.__globals__, drawn_by: draw})(self, *args, **kwargs)

    return drawing


def _with_names(method: Any, names: dict[str, Any]) -> Any:
    """A copy of a function that knows these names, below copies of its decorators.

    Raises:
        ValueError: a decorator keeps elsewhere than in its closure what it decorates.
    """
    cells = method.__closure__ or ()
    decorated = getattr(method, "__wrapped__", None)
    if decorated is not None:
        if not any(cell.cell_contents is decorated for cell in cells):
            raise ValueError(f"{method.__qualname__} has a decorator that cannot be copied")
        below = CellType(_with_names(decorated, names))
        cells, names = tuple(below if cell.cell_contents is decorated else cell for cell in cells), method.__globals__
    copied = FunctionType(method.__code__, names, method.__name__, method.__defaults__, cells)
    copied.__kwdefaults__ = method.__kwdefaults__
    return copied


def sample(logits: torch.Tensor, top_k: int, top_p: float, rng: torch.Generator | None) -> torch.Tensor:
    """One draw of each row of logits (B, n, V), (B, n, 1) int64; a generator gives the seeds."""
    seeds = torch.randint(2**62, (len(logits),), generator=rng, device=logits.device)
    options: dict[str, Any] = {"top_p": min(top_p, 1.0), "seeds": seeds}
    if logits.shape[2] == 2:
        difference = (logits[..., 1] - logits[..., 0])[..., None]
        return sample_bits(difference, top_k=min(top_k, 2), **options).bits.long()
    return sample_tokens(logits, top_k=top_k, **options).tokens[..., None]
