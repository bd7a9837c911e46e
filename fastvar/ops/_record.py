"""The record of a call: from the types of its fields to a schema, and between the two forms of its values.

A record is a NamedTuple or a dataclass. A field is a tensor, a number, a flag, a name, some integers or flags, a
schedule, or another record, which may be absent as a whole. A schema knows no records: there each field of an inner one
is an argument of its own, called after both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch

from fastvar.schedule import ScaleSchedule

C = TypeVar("C")

# Text in an annotation is the schema's type, where it does not follow from Python's; any other annotation, such as what
# numbers a field may have, is no affair of the schema.
Scalar = Annotated[float, "Scalar"]  # a number that may change from call to call of one compiled graph
Written = Annotated[torch.Tensor, "Tensor(!)"]  # that the call writes to

_TYPES = {
    torch.Tensor: "Tensor",
    float: "float",
    int: "SymInt",
    bool: "bool",
    str: "str",
    tuple[int, ...]: "SymInt[]",
    tuple[bool, ...]: "bool[]",
    ScaleSchedule: "int[]",
}


class _Field(NamedTuple):
    """A field of a record.

    Attributes:
        name: its own.
        schema: its type in the schema, or "" for an inner record.
        inner: the inner record.
        optional: whether it may be None.
        restored: makes the field's value of the schema's; None where they are the same.
    """

    name: str
    schema: str
    inner: Record[Any] | None
    optional: bool
    restored: Callable[[Any], Any] | None


class Record(Generic[C]):
    """What a NamedTuple or a dataclass of typed fields says of a call.

    Attributes:
        names: of the schema's arguments.
        types: of the same.
        tensors: places of the tensors among them.
        written: places of those that the call writes to.

    Raises:
        TypeError: a field of a type that no schema has.
    """

    def __init__(self, call: type[C], optional: bool = False) -> None:
        self.call = call
        self._fields = [_field(name, hint) for name, hint in get_type_hints(call, include_extras=True).items()]
        self.names: list[str] = []
        self.types: list[str] = []
        for field in self._fields:
            names, types = [field.name], [field.schema + "?" * field.optional]
            if field.inner is not None:
                names = [f"{field.name}_{name}" for name in field.inner.names]
                types = [kind.removesuffix("?") + "?" if field.optional else kind for kind in field.inner.types]
            self.names += names
            self.types += types
        self.tensors = [i for i, kind in enumerate(self.types) if kind.startswith("Tensor")]
        self.written = [i for i, kind in enumerate(self.types) if "!" in kind]
        self._plain = all(field.inner is None and field.restored is None for field in self._fields)

    @property
    def schema(self) -> str:
        """The arguments of a schema."""
        letters = iter("abcdefgh")
        kinds = [kind.replace("(!)", f"({next(letters)}!)") if "!" in kind else kind for kind in self.types]
        return ", ".join(f"{kind} {name}" for kind, name in zip(kinds, self.names, strict=True))

    def values(self, call: Any) -> Sequence[Any]:
        """The schema's arguments for a call."""
        own = call if isinstance(call, tuple) else [getattr(call, field.name) for field in self._fields]
        if self._plain:
            return own
        values: list[Any] = []
        for field, value in zip(self._fields, own, strict=True):
            if field.inner is None:
                values.append(value.flat if isinstance(value, ScaleSchedule) else value)
            elif value is None:
                values += [None] * len(field.inner.names)
            else:
                values += [*field.inner.values(value)]  # a list: PyTorch 2.11 compiles no other
        return values

    def restore(self, values: Sequence[Any]) -> C:
        """The call of the schema's arguments."""
        if self._plain:
            return self.call(*values)
        fields: list[Any] = []
        start = 0
        for field in self._fields:
            if field.inner is None:
                value = values[start]
                fields.append(value if field.restored is None or value is None else field.restored(value))
                start += 1
                continue
            end = start + len(field.inner.names)
            # the first of an inner record's values is never None
            absent = field.optional and values[start] is None
            fields.append(None if absent else field.inner.restore(values[start:end]))
            start = end
        return self.call(*fields)


def _field(name: str, hint: Any) -> _Field:
    optional = get_origin(hint) is UnionType or NoneType in get_args(hint)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Annotated:
        hint, note, *_ = get_args(hint)
        if isinstance(note, str):
            return _Field(name, note, None, optional, None)
    if hint not in _TYPES:
        if hasattr(hint, "_fields") or is_dataclass(hint):
            return _Field(name, "", Record(hint), optional, None)
        raise TypeError(f"{name}: expected a record or one of {', '.join(map(str, _TYPES))}, got {hint}")
    restored = ScaleSchedule.from_flat if hint is ScaleSchedule else tuple if get_origin(hint) is tuple else None
    return _Field(name, _TYPES[hint], None, optional, restored)
