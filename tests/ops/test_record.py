"""The record of a call: what its types say of a schema, and that both forms of a call are the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fastvar import ScaleSchedule
from fastvar.ops._record import Record, Scalar, Written


class Inner(NamedTuple):
    k: torch.Tensor
    lengths: torch.Tensor | None
    ratio: float
    index: tuple[int, ...]


class Call(NamedTuple):
    x: torch.Tensor
    cache: Written
    bias: torch.Tensor | None
    inner: Inner | None
    schedule: ScaleSchedule
    guidance: Scalar
    position: int
    name: str
    flags: tuple[bool, ...]


RECORD = Record(Call)


def test_the_schema_follows_from_the_types() -> None:
    assert RECORD.schema == (
        "Tensor x, Tensor(a!) cache, Tensor? bias, Tensor? inner_k, Tensor? inner_lengths, float? inner_ratio, "
        "SymInt[]? inner_index, int[] schedule, Scalar guidance, SymInt position, str name, bool[] flags"
    )
    assert [RECORD.names[i] for i in RECORD.tensors] == ["x", "cache", "bias", "inner_k", "inner_lengths"]
    assert [RECORD.names[i] for i in RECORD.written] == ["cache"]


@pytest.mark.parametrize("inner", [None, Inner(torch.ones(1), None, 0.5, (0, 1))])
def test_both_forms_of_a_call_are_the_same(inner: Inner | None) -> None:
    x = torch.zeros(2)
    call = Call(x, x, None, inner, ScaleSchedule((1, (2, 3))), 1.5, 3, "area", (True, False))
    values = RECORD.values(call)
    assert len(values) == len(RECORD.names) and (1, 1, 2, 3) in values
    # PyTorch hands lists over where the record has tuples
    assert RECORD.restore([list(v) if isinstance(v, tuple) else v for v in values]) == call


def test_a_type_that_no_schema_has() -> None:
    class Wrong(NamedTuple):
        x: torch.Tensor
        anything: Any

    with pytest.raises(TypeError, match=r"anything: expected a record or one of .* got typing.Any"):
        Record(Wrong)
