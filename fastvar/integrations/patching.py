"""Replaces methods of modules that are recognised by their attributes, says what it did, and takes it back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pickle import PicklingError
from types import MethodType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.integrations.var_fork import fits, following
from fastvar.schedule import ScaleSchedule

PARTS = ("attention", "blocks", "texts", "quantizer", "sampler", "loss")
"""What can be replaced: attention in training and sampling; norms, gated residuals and modulations; what tokens see of
texts; quantisation and teacher forcing; the draw of tokens or bits; a line of a trainer's loss."""
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
        self._masks: dict[tuple[tuple[int, ...], int], bool | None] = {}
        self._kept: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}

    def start(self, sampling: bool) -> None:
        """An image begins or has ended: nothing of the last one is kept."""
        self.sampling = sampling
        self.caches.clear()
        self._kept.clear()

    def once(self, name: Hashable, make: Callable[[], Any], *of: Any) -> Any:
        """What `make` makes of some objects, in sampling once an image, as long as they are the same objects."""
        return self.keep(name, make, *of) if self.sampling and not torch.is_grad_enabled() else make()

    def keep(self, name: Hashable, make: Callable[[], Any], *of: Any) -> Any:
        """As `once`, in training too: for what has no gradient."""
        kept, made = self._kept.get(name, ((), None))
        if len(kept) != len(of) or any(a is not b for a, b in zip(kept, of, strict=True)):
            made = make()
            self._kept[name] = of, made
        return made

    def block_diagonal(self, mask: torch.Tensor, lengths: tuple[int, ...]) -> bool | None:
        """Whether a mask (1, 1, L', L') of zeros and minus infinities shows the L tokens of scales of these lengths,
        which padding may follow, their own scale alone; False if also the coarser scales, None if it is neither.

        Looked at once for each lengths, as that waits for the device.
        """
        key = lengths, mask.shape[-1]
        if key not in self._masks:
            scale = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(mask.device)
            found = mask[0, 0, : len(scale)].detach()
            self._masks[key] = None
            for diagonal, seen in ((False, scale[:, None] >= scale), (True, scale[:, None] == scale)):
                seen = F.pad(seen, (0, mask.shape[-1] - len(scale)))
                if torch.equal(found, torch.where(seen, 0.0, -torch.inf).to(found.dtype)):
                    self._masks[key] = diagonal
        return self._masks[key]


@dataclass
class Own:
    """What a patched object knows besides, as its attribute `_fastvar`.

    Attributes:
        run: shared by all of its model.
        schedule: the model's, if it has one.
        former: the methods before, bound.
        changed: what each attribute was before and what it was set to; the object itself stands for none.
        caches: of an attention, whether its cache is in our layout.
        quantized: of a quantizer the tokens of its last call, their versions, and the inputs that belong to them.
    """

    run: Run
    schedule: ScaleSchedule | None
    former: dict[str, Callable[..., Any]] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    caches: bool = False
    quantized: tuple[Any, Any, torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(**{each.name: copy.deepcopy(getattr(self, each.name), memo) for each in fields(self)})

    def __getstate__(self) -> Any:
        raise PicklingError(
            "integrations: pickle: expected a model as it was, got a patched one; undo first, and apply in each process"
        )


class Patch(NamedTuple):
    """How a kind of object is recognised and what is put in place of its methods.

    Attributes:
        part: one of PARTS.
        what: it is, in words.
        has: attributes by which it is recognised.
        methods: a class whose functions become methods of the object.
        obstacle: why one object cannot be patched, or None.
        note: what is different afterwards by intention.
        stays: what of the object stays as it is, and why.
    """

    part: str
    what: str
    has: tuple[str, ...]
    methods: type
    obstacle: Callable[[Any], str | None] = lambda found: None
    note: str = ""
    stays: str = ""

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
            if not fits(former, expected):
                return f"its {name} takes ({', '.join(takes)}), expected ({', '.join(expected)})"
        return None

    def surplus(self, found: Any) -> int:
        """How many arguments more the methods of an object take that has them."""
        return sum(
            len(_arguments(getattr(found, name))) - len(_arguments(MethodType(function, found)))
            for name, function in self.functions.items()
        )


class Replaced(NamedTuple):
    """Methods of an object that were replaced: part, the object's place and class, the kind, what is different."""

    part: str
    place: str
    kind: str
    what: str
    note: str


class Left(NamedTuple):
    """An object that was recognised and left as it is, or what of one was, and why; of a trainer its "loss"."""

    part: str
    place: str
    kind: str
    why: str


class Applied:
    """What `apply` did. Printed it is a report; `undo()` takes it back, as does the end of a `with` block.

    Attributes:
        replaced: what now runs fastvar's operators; with attention, blocks or texts goes `kv_caching`, by which it is
            known when an image begins.
        left: what was recognised and left as it is, and why.
    """

    def __init__(self, schedule: ScaleSchedule | None) -> None:
        self._run, self._schedule = Run(), schedule
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._owners: list[Any] = []

    def own(self, owner: Any) -> Own:
        """What an object knows besides, which it has from now on until `undo`."""
        if _OWN not in vars(owner):
            vars(owner)[_OWN] = Own(self._run, self._schedule)
            self._owners.append(owner)
        return own(owner)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give an object an attribute of its own, or another class by the name `__class__`, until `undo`."""
        changed = self.own(owner).changed
        changed[name] = changed[name][0] if name in changed else _attribute(owner, name), value
        _put(owner, name, value)

    def undo(self) -> None:
        """Give every object its attributes back. A second call does nothing.

        Raises:
            RuntimeError: one was replaced since, by a library's hooks for instance; nothing is undone.
        """
        _restore([owner for owner in self._owners if _OWN in vars(owner) and own(owner).run is self._run])
        self._owners.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [*_grouped("replaced", self.replaced), *_grouped("left", self.left)]
        notes = dict.fromkeys(each.note for each in self.replaced if each.note)
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def apply(model: Any, parts: str | Iterable[str] = "all") -> Applied:
    """Put fastvar's operators in place of methods of a model that has the attributes of the public VAR, Infinity, HART
    or Switti.

    Objects are recognised by their attributes, never by the names of classes or modules, and get methods of their own:
    parameters, state dict, hooks (but those of a norm that is fused), autocast, checkpointing and wrapping by DDP or
    FSDP are as before. Apply before a model is wrapped or compiled; undo before it is pickled. What a fork changed
    inside a method that has kept its arguments is not seen: compare logits once with and without. A method that takes
    further arguments with defaults is replaced for calls that leave them at these, attention with a cache not at all.

    Args:
        model: the model; or a tokenizer, Infinity's `BitwiseSelfCorrection` or trainer, Switti's pipeline. What a model
            holds in tuples (its tokenizer) belongs to it. What is patched already with another model stays so.
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
    if hasattr(model, _OWN):
        raise ValueError("integrations.apply: model: is patched already; undo that first")
    applied = Applied(next(filter(None, (_schedule(found) for _, found in objects)), None))
    try:
        _replace(applied, objects, wanted)
    except Exception:
        applied.undo()
        raise
    if not applied.replaced:
        applied.undo()
        reason = applied.left[0].why if applied.left else "nothing in it has the attributes of one"
        expected = "a VAR, an Infinity, a HART or a Switti"
        raise ValueError(f"integrations.apply: model: expected {expected}, got {type(model).__name__}: {reason}")
    applied.own(model)  # by which it is known to be patched
    return applied


def undo(model: Any) -> None:
    """Take back what `apply` did to a model, or to one of which it is a copy, and to all that belongs to it.

    Raises:
        RuntimeError: as `Applied.undo`.
    """
    _restore([found for _, found in _objects(model) if _OWN in vars(found)])


def own(found: Any) -> Own:
    """What a patched object knows besides."""
    return found._fastvar


def _replace(applied: Applied, objects: Sequence[tuple[str, Any]], wanted: Sequence[str]) -> None:
    from fastvar.integrations import hart, infinity, samplers, switti, var

    known = (*var.PATCHES, *infinity.PATCHES, *hart.PATCHES, *switti.PATCHES)
    patches = [patch for patch in known if patch.part in wanted]
    free = []
    for place, found in objects:
        if hasattr(found, _OWN):
            parts = {patch.part for patch in patches if all(hasattr(found, name) for name in patch.has)}
            why = "it is patched already, with another model"
            applied.left += [Left(part, place, type(found).__name__, why) for part in wanted if part in parts]
        else:
            free.append((place, found))
    for place, found in free:
        _replace_methods(applied, place, found, patches)
        if "sampler" in wanted:
            samplers.replace(applied, place, found)
        if "loss" in wanted:
            infinity.mend_the_loss(applied, place, found)
    if "attention" in wanted:
        for place, found in free:
            infinity.leave_out_the_mask(applied, place, found)
    if "texts" in wanted:
        switti.leave_texts(applied, free)
    if set(wanted) & {"attention", "blocks", "texts"}:  # which keep things as long as an image lasts
        switch = Patch("", "", ("caching", "cached_k", "cached_v", "kv_caching"), var.KVCaching)
        for _, found in free:
            if all(hasattr(found, name) for name in switch.has) and switch.misfit(found) is None:
                _bind(applied, found, switch)


def _replace_methods(applied: Applied, place: str, found: Any, patches: Sequence[Patch]) -> None:
    """By the patch of each part whose methods take the same arguments, or else the fewest less."""
    alike = [patch for patch in patches if all(hasattr(found, name) for name in patch.has)]
    misfits = [patch.misfit(found) for patch in alike]
    fitting: dict[str, Patch] = {}
    for patch, misfit in zip(alike, misfits, strict=True):
        best = fitting.get(patch.part)
        if misfit is None and (best is None or patch.surplus(found) < best.surplus(found)):
            fitting[patch.part] = patch
    kind = type(found).__name__
    for patch in fitting.values():
        why = patch.obstacle(found)
        if why is None and hasattr(found, "cached_k") and patch.surplus(found):
            # a call of the former method in the middle of an image would not know our cache
            why = "it has a cache, and its methods take further arguments, which may change from scale to scale"
        if why is None:
            _bind(applied, found, patch)
            applied.replaced.append(Replaced(patch.part, place, kind, patch.what, patch.note))
            why = patch.stays
        if why:
            applied.left.append(Left(patch.part, place, kind, why))
    for patch, misfit in zip(alike, misfits, strict=True):
        if not fitting and misfit is not None:
            applied.left.append(Left(patch.part, place, kind, misfit))


def _bind(applied: Applied, found: Any, patch: Patch) -> None:
    for name, function in patch.functions.items():
        former = getattr(found, name)
        # a bound method: a deep copy of the object gets one of its own
        applied.set(found, name, MethodType(following(function, former), found))
        own(found).former[name] = former


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of an object's own, or its class; the object itself if there is none."""
    return type(owner) if name == "__class__" else vars(owner).get(name, owner)


def _put(owner: Any, name: str, value: Any) -> None:
    if name == "__class__":
        owner.__class__ = value
    elif value is owner:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


def _restore(owners: Sequence[Any]) -> None:
    for owner in owners:
        for name, (_, value) in own(owner).changed.items():
            if _attribute(owner, name) is not value:
                raise RuntimeError(f"integrations: undo: expected {name} as it was set, got another; undo that first")
    for owner in owners:
        for name, (before, _) in own(owner).changed.items():
            _put(owner, name, before)
        del vars(owner)[_OWN]


def _objects(model: Any) -> Iterator[tuple[str, Any]]:
    """An object, its submodules and what they hold in tuples and attributes that are no submodules, by their places;
    with a trainer its self-correction."""
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
                if isinstance(item, nn.Module) or hasattr(item, "flip_requant"):
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
