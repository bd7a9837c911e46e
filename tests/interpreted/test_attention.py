"""Attention in Triton beyond the calls of the contract: tiles, layouts, parts of a group, addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from fastvar.kernels.block_causal_attention import impl_triton, tiles
from fastvar.kernels.cached_attention import tiles as cached_tiles

from fastvar import ScaleSchedule, ops
from fastvar.ops.block_causal_attention import PrefixKV
from tests.helpers.samples import SAMPLES, noise
from tests.interpreted.test_kernels import attend, attention, check, run

NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes all tiles 16 x 16, so that few tokens are several tiles; keys come by descriptors if told so."""

    def force(descriptors: int) -> None:
        for table in (tiles.BACKWARD_Q, tiles.BACKWARD_KV, tiles.BACKWARD_PREFIX, cached_tiles.PART):
            monkeypatch.setattr(table, "forced", SMALL)
        monkeypatch.setattr(tiles.FORWARD, "forced", {**SMALL, "DESCRIPTORS": descriptors})

    force(0)
    yield force


def group(heads: int = 1) -> dict[str, Any]:
    """Two prefixes of 40 tokens, each of two samples of 35: among the tiles are whole ones that nothing masks."""
    return attention((1, 3, 5), heads, 16, group=2, prefix=40)


def few(heads: int = 1, group: int = 2) -> dict[str, Any]:
    """The same with a whole tile and a ragged one of each, for what does not concern masks."""
    return attention((1, 4), heads, 16, group=group, prefix=20)


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_small_tiles(small: Any, block_diagonal: bool) -> None:
    check(attend, group() | {"block_diagonal": block_diagonal}, NAMES)
    check(attend, attention((1, 2, 3, 5), 1, 24) | {"block_diagonal": block_diagonal}, ("q", "k", "v"))
    check(attend, attention((1, 5), 1, 72) | {"block_diagonal": block_diagonal}, ("k", "v"))  # keys' loops are others


@pytest.mark.parametrize("lengths", [None, [40, 0], [17, 32]])
def test_keys_by_descriptors(small: Any, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as by pointers; taken where the layout lets them, as of values that are a slice of a projection."""
    arguments = group(heads=2) | {"lengths": None if lengths is None else torch.tensor(lengths)}
    plain = run(attend, arguments, (), "triton")
    taken = []
    describe = impl_triton._descriptor
    monkeypatch.setattr(impl_triton, "_descriptor", lambda *a: taken.append(describe(*a)) or taken[-1])
    small(1)

    def of(changes: dict[str, torch.Tensor]) -> bool:
        """Whether all come by descriptors."""
        taken.clear()
        found = run(attend, arguments | changes, (), "triton")
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert len(taken) == 4
        return None not in taken

    assert of({})
    if lengths is None:
        assert of({"v": torch.stack([arguments["v"]] * 3, 2)[:, :, 2]})
        odd = torch.cat([arguments["k"], arguments["k"]], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., :16]
        assert not of({"k": odd})
        assert not of({n: arguments[n].transpose(1, 2).contiguous().transpose(1, 2) for n in NAMES})


def test_descriptors_of_what_the_hardware_takes() -> None:
    whole = torch.empty(2, 5, 3, 16, dtype=torch.float16)
    taken = impl_triton._descriptor(whole, 8)
    assert taken is not None and taken.shape == (10, 48) and taken.strides == (48, 1) and taken.block_shape == [8, 16]
    gap = torch.empty(2, 6, 3, 16, dtype=torch.float16)[:, :5]
    shifted = torch.empty(481, dtype=torch.float16)[1:].view(2, 5, 3, 16)
    odd = torch.empty(2, 5, 3, 12, dtype=torch.float16)
    narrow = torch.empty(2, 5, 1, 4, dtype=torch.float16)
    expanded = torch.empty(1, 1, 3, 16, dtype=torch.float16).expand(1, 5, 3, 16)
    assert not any(impl_triton._descriptor(t, 8) for t in (gap, shifted, odd, narrow, expanded, None))
    assert impl_triton._descriptor(gap[:1], 8) is not None


@pytest.mark.parametrize(("dim", "grids"), [(128, (2, 4, 6)), (104, (2, 7)), (120, (4,))])
def test_wide_heads_in_half_precision(dim: int, grids: tuple[int, ...]) -> None:
    arguments = attention(grids, 1, dim, group=2, prefix=70)
    check(attend, {n: t.half() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}, NAMES)


@pytest.mark.parametrize("name", ["block_causal_attention", "cached_attention"])
def test_calls_of_the_contract_in_bfloat16(name: str) -> None:
    for i, sample in enumerate(SAMPLES[name](torch.bfloat16)):
        print(f"sample {i}")
        check(*sample)


@pytest.mark.parametrize("descriptors", [0, 1])
def test_several_tiles_in_bfloat16(small: Any, descriptors: int) -> None:
    small(descriptors)
    arguments = {n: t.bfloat16() if isinstance(t, torch.Tensor) else t for n, t in group().items()}
    check(attend, arguments, NAMES)


@pytest.mark.parametrize("softmax_scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(small: Any, softmax_scale: float) -> None:
    check(attend, few() | {"softmax_scale": softmax_scale}, NAMES)
    q = few()["q"]
    check(ops.cached_attention, {"q": q, "k": q, "v": q, "softmax_scale": softmax_scale}, ())


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda t: t.movedim(3, 1).contiguous().movedim(1, 3),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "one row": lambda t: t[:1].expand(t.shape),
}


def test_inputs_of_any_layout(small: Any) -> None:
    arguments = few(heads=2, group=1)
    expected = {}
    for one_row in (False, True):  # of which all samples are the same
        plain = {
            n: arguments[n][:1].expand(arguments[n].shape).contiguous() if one_row else arguments[n] for n in NAMES
        }
        cached = ops.cached_attention(plain["q"], plain["k"], plain["v"], backend="triton")
        expected[one_row] = [*run(attend, arguments | plain, NAMES, "triton"), cached]
    for layout, turn in LAYOUTS.items():
        turned = {n: turn(arguments[n]) for n in NAMES}
        found = run(attend, arguments | turned, NAMES, "triton")
        found.append(ops.cached_attention(turned["q"], turned["k"], turned["v"], backend="triton"))
        assert all(torch.equal(a, b) for a, b in zip(found, expected[layout == "one row"], strict=True)), layout


@pytest.mark.parametrize("alone", [("q",), ("k",), ("prefix_v",), ("v", "prefix_k")])
def test_only_some_gradients(small: Any, alone: tuple[str, ...]) -> None:
    check(attend, few(), alone)


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_gradient_of_the_log_sum_exp_alone(small: Any, block_diagonal: bool) -> None:
    def sums(**arguments: Any) -> torch.Tensor:
        return attend(**arguments)[1]

    check(sums, few() | {"block_diagonal": block_diagonal}, ("q", "k", "prefix_k"))


def prefix_gradients(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    return run(attend, dict(arguments), ("prefix_k", "prefix_v"), "triton", layout=torch.ones_like)[2:]


def test_parts_of_a_group(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix's gradient is right in any number of parts, and has the same bits beside other prefixes, and where they
    are taken in turn."""
    arguments = few() | {"lengths": torch.tensor([20, 17])}
    monkeypatch.setattr(impl_triton, "SHORTEST", 1)
    launches: list[int] = []
    add = impl_triton.block_causal_attention_bwd_prefix_sum_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            launches.append(grid[0])
            return add[grid]

    monkeypatch.setattr(impl_triton, "block_causal_attention_bwd_prefix_sum_kernel", Counted())
    for programs, parts in ((1, False), (5, True)):
        monkeypatch.setattr(impl_triton, "PROGRAMS", programs)
        launches.clear()
        check(attend, arguments, ("prefix_k", "prefix_v"))
        assert bool(launches) == parts
        both = prefix_gradients(arguments)
        first = {n: t[: len(t) // 2] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        assert all(torch.equal(a[:1], b) for a, b in zip(both, prefix_gradients(first), strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(impl_triton, "PARTS_BYTES", 1)
            launches.clear()
            assert all(torch.equal(a, b) for a, b in zip(both, prefix_gradients(arguments), strict=True))
            assert len(launches) == 2 * parts


def test_lengths_outside_of_the_prefix(small: Any) -> None:
    """Those above P mean P, and those below 0 mean 0."""
    arguments = few()
    given, meant = ({**arguments, "lengths": torch.tensor(lengths)} for lengths in ([2**31 + 5, -3], [20, 0]))
    found, expected = (run(attend, a, NAMES, "triton") for a in (given, meant))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    q = arguments["q"]
    found, expected = (
        ops.cached_attention(q, q, q, prefix=PrefixKV(a["prefix_k"], a["prefix_v"], a["lengths"]), backend="triton")
        for a in (given, meant)
    )
    assert torch.equal(found, expected)


def test_order_of_programs(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which heads take turns changes no bit; three heads of two samples are no multiple of a bundle of four."""
    arguments = attention((1, 4), 3, 16)
    plain = run(attend, arguments, ("q", "k", "v"), "triton")
    for bundle in (0, 4 * 2 * 17 * 16 * 4, 1 << 30):
        monkeypatch.setattr(impl_triton, "CACHED", bundle)
        found = run(attend, arguments, ("q", "k", "v"), "triton")
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), bundle


def spread(values: torch.Tensor, axis: int, gap: int) -> torch.Tensor:
    """The same with elements so far apart along an axis, in memory of which a few pages are touched."""
    strides, step = [0] * values.ndim, 1
    for i in reversed(range(values.ndim)):
        if i != axis:
            strides[i] = step
            step *= values.shape[i]
    strides[axis] = gap
    memory = torch.empty(gap * (values.shape[axis] - 1) + step, dtype=values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


def test_rows_far_apart() -> None:
    """Beyond 2**31 elements, as of a sequence-first projection of a large model."""
    near = dict(zip(("q", "k", "v"), noise(3, 2, 4, 2, 16).half().unbind(), strict=True))

    def results(arguments: dict[str, Any]) -> list[torch.Tensor]:
        cached = ops.cached_attention(**arguments, backend="triton")
        return [*run(attend, arguments | {"schedule": ScaleSchedule(((1, 1), (1, 3)))}, tuple(near), "triton"), cached]

    expected = results(near)
    for name, axis, gap in (("q", 1, 2**30), ("k", 1, 2**30), ("v", 2, 2**31), ("k", 0, 2**31)):
        found = results(near | {name: spread(near[name], axis, gap)})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (name, axis)
