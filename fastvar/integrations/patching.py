"""Replaces methods of modules that are recognised by their attributes, says what it did, and takes it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.schedule import ScaleSchedule

PARTS = ("attention", "blocks", "texts", "quantizer", "sampler")
"""What can be replaced: attention in training and sampling; norms, gated residuals and modulations; what tokens see of
texts; quantisation and teacher forcing; the draw of tokens or bits."""
_OWN = "_fastvar"


class Run:
    """What the modules of one model share: whether it is sampling, and what of an image need not be computed twice.

    Attributes:
        sampling: between `kv_caching(True)` and `kv_caching(False)`.
        caches: of each attention the filled keys, as it shows them, and keys and values with all their room.
    """

    def __init__(self) -> None:
        self.sampling = False
        self.caches: dict[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[ScaleSchedule, int], bool | None] = {}
        self._kept: dict[Hashable, tuple[Any, Any]] = {}

    def start(self, sampling: bool) -> None:
        """An image begins or has ended: nothing of the last one is kept."""
        self.sampling = sampling
        self.caches.clear()
        self._kept.clear()

    def once(self, name: Hashable, of: torch.Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a tensor, in sampling once an image, as long as the tensor is the same object."""
        if not self.sampling or torch.is_grad_enabled():
            return make()
        kept, made = self._kept.get(name, (None, None))
        if kept is not of:
            made = make()
            self._kept[name] = of, made
        return made

    def block_diagonal(self, mask: torch.Tensor, schedule: ScaleSchedule) -> bool | None:
        """Whether a mask (1, 1, L', L') of zeros and minus infinities shows the L tokens of a schedule, which padding
        may follow, their own scale alone; False if also the coarser scales, None if it is neither.

        Looked at once for each schedule and length, as that waits for the device.
        """
        length, key = schedule.num_tokens, (schedule, mask.shape[-1])
        if key not in self._masks:
            scale, found = torch.tensor(schedule.scale_of_token), mask[0, 0, :length].detach().float().cpu()
            self._masks[key] = None
            for diagonal, seen in ((False, scale[:, None] >= scale), (True, scale[:, None] == scale)):
                seen = F.pad(seen, (0, mask.shape[-1] - length))
                if torch.equal(found, torch.where(seen, 0.0, -torch.inf)):
                    self._masks[key] = diagonal
        return self._masks[key]


@dataclass
class Own:
    """What a patched object knows besides, as its attribute `_fastvar`.

    Attributes:
        run: shared by all of its model.
        schedule: the model's, if it has one.
        former: the methods before, bound.
        quantized: of a quantizer the tokens of its last call, their versions, and the inputs that belong to them.
    """

    run: Run
    schedule: ScaleSchedule | None
    former: dict[str, Callable[..., Any]] = field(default_factory=dict)
    quantized: tuple[Any, Any, torch.Tensor] | None = None


class Patch(NamedTuple):
    """How a kind of object is recognised and what is put in place of its methods.

    Attributes:
        part: one of PARTS.
        what: it is, in words.
        has: attributes by which it is recognised.
        methods: a class whose functions become methods of the object.
        obstacle: why one object cannot be patched, or None.
        note: what is different afterwards by intention.
    """

    part: str
    what: str
    has: tuple[str, ...]
    methods: type
    obstacle: Callable[[Any], str | None] = lambda found: None
    note: str = ""

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        return dict(inspect.getmembers(self.methods, inspect.isfunction))

    def misfit(self, found: Any) -> str | None:
        """What is wrong with the methods of an object that has the attributes, or None."""
        for name, function in self.functions.items():
            former = getattr(found, name, None)
            if not callable(former):
                return f"it has no method {name}"
            if name in vars(found):
                return f"its {name} was replaced by somebody else"
            takes, expected = _arguments(former), _arguments(MethodType(function, found))
            if takes != expected:
                return f"its {name} takes ({', '.join(takes)}), expected ({', '.join(expected)})"
        return None


class Replaced(NamedTuple):
    """Methods of an object that were replaced: part, the object's place and class, the kind, what is different."""

    part: str
    place: str
    kind: str
    what: str
    note: str


class Left(NamedTuple):
    """An object that was recognised and left as it is, and why."""

    part: str
    place: str
    kind: str
    why: str


class Applied:
    """What `apply` did. Printed it is a report; `undo()` takes it back, as does the end of a `with` block.

    Attributes:
        replaced: what now runs fastvar's operators.
        left: what was recognised and left as it is, and why.
    """

    def __init__(self, schedule: ScaleSchedule | None) -> None:
        self._run, self._schedule = Run(), schedule
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._before: list[tuple[dict[str, Any], str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give an object an attribute of its own until `undo`; with the first one comes `_fastvar`."""
        members = vars(owner)
        if name != _OWN and _OWN not in members:
            self.set(owner, _OWN, Own(self._run, self._schedule))
        self._before.append((members, name, members.get(name, self), value))  # itself stands for none
        members[name] = value

    def undo(self) -> None:
        """Give every object its attributes back. A second call does nothing.

        Raises:
            RuntimeError: one was replaced since, by a library's hooks for instance; nothing is undone.
        """
        for members, name, _, own_value in self._before:
            if members.get(name) is not own_value:
                raise RuntimeError(f"integrations: undo: expected {name} as it was set, got another; undo that first")
        while self._before:
            members, name, value, _ = self._before.pop()
            if value is self:
                members.pop(name, None)
            else:
                members[name] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [*_grouped("replaced", self.replaced), *_grouped("left", self.left)]
        notes = dict.fromkeys(each.note for each in self.replaced if each.note)
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def apply(model: Any, parts: str | Iterable[str] = "all") -> Applied:
    """Put fastvar's operators in place of methods of a model that has the attributes of the public VAR or Infinity.

    Objects are recognised by their attributes, never by the names of classes or modules, and get methods of their own:
    parameters, state dict, hooks, autocast, checkpointing and wrapping by DDP or FSDP are as before. Apply before a
    model is wrapped or compiled. What a fork changed inside a method that has kept its arguments is not seen: compare
    logits once with and without.

    Args:
        model: the model; or a tokenizer, or Infinity's `BitwiseSelfCorrection`. What the model holds in tuples (its
            tokenizer) belongs to it.
        parts: "all", or some of `PARTS`.

    Returns:
        What was replaced, what was not and why.

    Raises:
        ValueError: an unknown part, a model that is patched already, or one in which nothing can be replaced.

    A sampler's seeds give other images than before: its draws are counter-based (see `fastvar.ops.sample_tokens`).
    """
    wanted = PARTS if parts == "all" else (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise ValueError(f"integrations.apply: parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    objects = list(_objects(model))
    if any(hasattr(found, _OWN) for _, found in objects):
        raise ValueError("integrations.apply: model: is patched already; undo that first")
    applied = Applied(next(filter(None, (_schedule(found) for _, found in objects)), None))
    try:
        _replace(applied, objects, wanted)
    except Exception:
        applied.undo()
        raise
    if not applied.replaced:
        reason = f": {applied.left[0].why}" if applied.left else ", found no blocks with mat_qkv, q_bias and v_bias"
        raise ValueError(
            f"integrations.apply: model: expected a VAR or an Infinity, got {type(model).__name__}{reason}"
        )
    return applied


def own(found: Any) -> Own:
    """What a patched object knows besides."""
    return found._fastvar


def _replace(applied: Applied, objects: Sequence[tuple[str, Any]], wanted: Sequence[str]) -> None:
    from fastvar.integrations import infinity, samplers, var

    patches = [patch for patch in (*var.PATCHES, *infinity.PATCHES) if patch.part in wanted]
    for place, found in objects:
        alike = [patch for patch in patches if all(hasattr(found, name) for name in patch.has)]
        misfits = [patch.misfit(found) for patch in alike]
        kind = type(found).__name__
        for patch, misfit in zip(alike, misfits, strict=True):
            why = patch.obstacle(found) if misfit is None else misfit
            if why is None:
                _bind(applied, found, patch)
                applied.replaced.append(Replaced(patch.part, place, kind, patch.what, patch.note))
            elif misfit is None or all(misfits):
                applied.left.append(Left(patch.part, place, kind, why))
        if "sampler" in wanted:
            samplers.replace(applied, place, found)
    if "attention" in wanted:
        for place, found in objects:
            infinity.leave_out_the_mask(applied, place, found)


def _bind(applied: Applied, found: Any, patch: Patch) -> None:
    for name, function in patch.functions.items():
        former = getattr(found, name)
        # a bound method: a deep copy of the object gets one of its own
        applied.set(found, name, MethodType(function, found))
        own(found).former[name] = former


def _objects(model: Any) -> Iterator[tuple[str, Any]]:
    """An object, its submodules and what they hold in tuples and attributes that are no submodules, by their places."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        place, found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield place or type(found).__name__, found
        members = dict(getattr(found, "__dict__", {}))
        if isinstance(found, nn.Module):
            members |= found._modules
        for name, value in members.items():
            for item in value if isinstance(value, tuple | list) else [value]:
                if isinstance(item, nn.Module):
                    waiting.append((f"{place}.{name}".lstrip("."), item))


def _schedule(found: Any) -> ScaleSchedule | None:
    """The grids of an object, if it is a VAR; Infinity's come with each call."""
    grids = getattr(found, "patch_nums", None)
    try:
        return None if grids is None else ScaleSchedule(tuple(grids))
    except (TypeError, ValueError):
        return None


def _arguments(method: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)


def _grouped(title: str, entries: Sequence[Replaced | Left]) -> list[str]:
    """A line for entries that differ in their places alone."""
    places: dict[tuple[str, ...], list[str]] = {}
    for part, place, kind, why, *_ in entries:
        places.setdefault((part, kind, why), []).append(place)
    return [
        f"{title}: {part}: {len(each)} x {kind} ({each[0]}{', ...' if len(each) > 1 else ''}): {why}"
        for (part, kind, why), each in places.items()
    ]
