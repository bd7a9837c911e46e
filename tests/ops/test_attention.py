"""block_causal_attention and cached_attention against a dense mask in float64, and against each other."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastvar.kernels.block_causal_attention import impl_torch
from fastvar.kernels.cached_attention import impl_torch as cached_impl_torch

from fastvar.ops import PrefixKV, block_causal_attention, cached_attention
from fastvar.schedule import VAR_256, ScaleSchedule
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

SQUARES = ScaleSchedule((1, 2, 3, 4))
RECTANGLES = ScaleSchedule(((1, 2), (2, 3), (2, 5)))
HEADS, DIM, PREFIX = 2, 6, 7


def mask(schedule: ScaleSchedule, prefix: int, lengths: list[int], block_diagonal: bool) -> torch.Tensor:
    """(B, L, P + L) bool, from the definition: a valid token of the prefix, or a scale that may be seen."""
    scale = torch.tensor(schedule.scale_of_token)
    image = scale[:, None] == scale if block_diagonal else scale[:, None] >= scale
    valid = torch.arange(prefix) < torch.tensor(lengths)[:, None]
    return torch.cat(
        [valid[:, None].expand(-1, len(scale), -1), image.expand(len(lengths), -1, -1)],
        2,
    )


def joined(own: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """The prefix of each row before its own tokens."""
    if shared is None:
        return own
    return torch.cat([torch.stack([shared[b * len(shared) // len(own)] for b in range(len(own))]), own], 1)


def visible(q: torch.Tensor, schedule: ScaleSchedule, prefix: PrefixKV | None, block_diagonal: bool) -> torch.Tensor:
    size = 0 if prefix is None else prefix.k.shape[1]
    lengths = [size] * len(q)
    if prefix is not None and prefix.lengths is not None:
        lengths = [int(prefix.lengths[b * len(prefix.k) // len(q)]) for b in range(len(q))]
    return mask(schedule, size, lengths, block_diagonal)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    prefix: PrefixKV | None = None,
    softmax_scale: float | None = None,
    block_diagonal: bool = False,
) -> torch.Tensor:
    """The definition in float64: all scores, a mask, a softmax."""
    k, v = joined(k, prefix and prefix.k).double(), joined(v, prefix and prefix.v).double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible(q, schedule, prefix, block_diagonal)[:, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def masked_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: ScaleSchedule, **rest: Any
) -> torch.Tensor:
    """What VAR runs: scaled_dot_product_attention with a dense mask, in the dtype of q."""
    prefix = rest.get("prefix")
    bias = visible(q, schedule, prefix, rest.get("block_diagonal", False))[:, None]
    parts = (q, joined(k, prefix and prefix.k), joined(v, prefix and prefix.v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts), attn_mask=bias).transpose(1, 2)


def projections(batch: int, length: int, dtype: torch.dtype = torch.float64, dim: int = DIM) -> torch.Tensor:
    """q, k and v as slices of one projection, sharp enough that attention picks and chooses."""
    return (noise(batch, length, 3, HEADS, dim) * 2).to(dtype).unbind(2)


def shared(rows: int, lengths: list[int] | None = None, dtype: torch.dtype = torch.float64, dim: int = DIM) -> PrefixKV:
    k, v = noise(2, rows, PREFIX, HEADS, dim, dtype=dtype, seed=1)
    return PrefixKV(k, v, None if lengths is None else torch.tensor(lengths, dtype=torch.int32))


PREFIXES = {
    "none": (4, None),
    "one each": (4, shared(4)),
    "shared by two": (4, shared(2)),
    "shared by all": (3, shared(1)),
    "ragged": (4, shared(4, [PREFIX, 0, 3, 1])),
    "ragged, shared": (6, shared(2, [0, 5])),
    "none valid": (2, shared(1, [0])),
}


@pytest.fixture(params=["reference", "torch", "torch, long"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On CPUs short sequences and long ones go different ways."""
    if request.param == "torch, long":
        monkeypatch.setattr(impl_torch, "DENSE", 0)
        monkeypatch.setattr(cached_impl_torch, "FEW", 0)
    return str(request.param).split(",")[0]


@pytest.mark.parametrize("name", PREFIXES)
def test_definition(name: str, backend: str) -> None:
    for schedule, block_diagonal in product((SQUARES, RECTANGLES, ScaleSchedule((1,))), (False, True)):
        batch, prefix = PREFIXES[name]
        arguments: dict[str, Any] = {"prefix": prefix, "block_diagonal": block_diagonal}
        q, k, v = projections(batch, schedule.num_tokens)
        for softmax_scale in (None, 0.25 / DIM**0.5, 1.0):
            got = block_causal_attention(q, k, v, schedule, softmax_scale=softmax_scale, backend=backend, **arguments)
            expected = dense(q, k, v, schedule, softmax_scale=softmax_scale, **arguments)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PREFIXES)
def test_gradients(name: str, backend: str) -> None:
    """Those of a shared prefix are summed over its group, those of its invalid tokens are zero."""
    batch, prefix = PREFIXES[name]
    leaves = [x.clone().requires_grad_() for x in projections(batch, RECTANGLES.num_tokens)]
    if prefix is not None:
        leaves += [prefix.k.clone().requires_grad_(), prefix.v.clone().requires_grad_()]
    weight = noise(batch, RECTANGLES.num_tokens, HEADS, DIM, dtype=torch.float64, seed=2)

    def gradients(function: Any) -> tuple[torch.Tensor, ...]:
        given = PrefixKV(leaves[3], leaves[4], prefix.lengths) if prefix is not None else None
        return torch.autograd.grad((function(*leaves[:3], RECTANGLES, prefix=given) * weight).sum(), leaves)

    own = gradients(partial(block_causal_attention, backend=backend))
    for got, expected in zip(own, gradients(dense), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


ORDERS = {"heads first": (0, 2, 1, 3), "heads last": (0, 1, 3, 2), "all turned": (3, 2, 1, 0)}


@pytest.mark.parametrize("name", PREFIXES)
def test_layouts(name: str, backend: str) -> None:
    """As with contiguous tensors; gradients are contiguous."""
    for order in ORDERS.values():
        batch, prefix = PREFIXES[name]
        back = tuple(sorted(range(4), key=order.__getitem__))
        plain = [x.contiguous() for x in projections(batch, SQUARES.num_tokens)]
        turned = [x.permute(order).contiguous().permute(back).requires_grad_() for x in plain]
        assert not turned[0].is_contiguous()
        got = block_causal_attention(*turned, SQUARES, prefix=prefix, backend=backend)
        torch.testing.assert_close(got, dense(*plain, SQUARES, prefix=prefix), rtol=1e-10, atol=1e-10)
        assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(got.sum(), turned))
        got = cached_attention(*(x.detach() for x in turned), prefix=prefix, backend=backend)
        expected = dense(*plain, ScaleSchedule(((1, SQUARES.num_tokens),)), prefix=prefix)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alone", [1, 2])
def test_cached_rows_do_not_depend_on_others(alone: int, backend: str) -> None:
    """A row of a group gives the same bits as without the others."""
    q, k, v = projections(6, 40, torch.float32, dim=64)
    prefix, trunk = (PrefixKV(*noise(2, rows, 300, HEADS, 64, seed=rows)) for rows in (2, 3))
    whole = cached_attention(q, k, v, prefix=prefix, trunk=trunk, backend=backend)
    row = slice(alone, alone + 1)
    own = [PrefixKV(part.k[i : i + 1], part.v[i : i + 1]) for part, i in ((prefix, alone // 3), (trunk, alone // 2))]
    single = cached_attention(q[row], k[row], v[row], prefix=own[0], trunk=own[1], backend=backend)
    assert torch.equal(single, whole[row])


def test_cached_without_keys(backend: str) -> None:
    q, k, v = projections(2, 3)
    assert not cached_attention(q, k[:, :0], v[:, :0], backend=backend).any()


def test_any_strides() -> None:
    q, k, v = projections(4, SQUARES.num_tokens)
    prefix = shared(2, [4, 7])
    expected = dense(q, k, v, SQUARES, prefix=prefix)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    backwards = PrefixKV(
        *(torch.empty(DIM, HEADS, PREFIX, 2).double().permute(3, 2, 1, 0).copy_(x) for x in prefix[:2])
    )
    got = block_causal_attention(*heads_first, SQUARES, prefix=backwards._replace(lengths=prefix.lengths))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    repeated = [x[:1].expand(4, -1, -1, -1) for x in (q, k, v)]
    expected = dense(*repeated, SQUARES, prefix=prefix)
    torch.testing.assert_close(block_causal_attention(*repeated, SQUARES, prefix=prefix), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_accuracy(dtype: torch.dtype, block_diagonal: bool) -> None:
    q, k, v = projections(2, VAR_256.num_tokens, dtype, dim=64)
    rest: dict[str, Any] = {"prefix": shared(1, [5], dtype, dim=64), "block_diagonal": block_diagonal}
    got = block_causal_attention(q, k, v, VAR_256, **rest)
    assert_as_accurate(got, masked_sdpa(q, k, v, VAR_256, **rest), dense(q, k, v, VAR_256, **rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_accuracy(dtype: torch.dtype) -> None:
    q, k, v = projections(4, 85, dtype, dim=64)
    own = slice(0, 65)
    prefix, trunk = shared(1, [5], dtype, dim=64), shared(2, None, dtype, dim=64)
    one = ScaleSchedule(((1, PREFIX), (1, 65)))  # trunk, own tokens: the last scale sees both
    whole = [joined(x[:, own], t) for x, t in ((q, trunk.k), (k, trunk.k), (v, trunk.v))]
    plain, exact = (f(*whole, one, prefix=prefix)[:, PREFIX:] for f in (masked_sdpa, dense))
    got = cached_attention(q[:, own], k[:, own], v[:, own], prefix=prefix, trunk=trunk)
    assert_as_accurate(got, plain, exact)


@pytest.mark.parametrize("name", PREFIXES)
def test_cached_scale_by_scale(name: str, backend: str) -> None:
    """Sampling against the whole sequence at once; after scale `forked` the rows go on from a shared trunk."""
    for forked in (None, 0, 1):
        batch, prefix = PREFIXES[name]
        q, k, v = projections(batch, RECTANGLES.num_tokens)
        split = 0 if forked is None else RECTANGLES.ends[forked]
        if split:
            # all rows agree up to the split, so that one trunk serves them all
            q, k, v = (torch.cat([x[:1, :split].expand(batch, -1, -1, -1), x[:, split:]], 1) for x in (q, k, v))
        whole = block_causal_attention(q, k, v, RECTANGLES, prefix=prefix)
        cache = torch.full((2, batch, 99, HEADS, DIM), torch.nan, dtype=q.dtype)
        trunk = PrefixKV(k[:1, :split], v[:1, :split]) if split else None
        for start, end in zip(RECTANGLES.starts, RECTANGLES.ends, strict=True):
            if start < split:
                continue
            cache[0, :, start - split : end - split] = k[:, start:end]
            cache[1, :, start - split : end - split] = v[:, start:end]
            keys, values = cache[:, :, : end - split]
            got = cached_attention(q[:, start:end], keys, values, prefix=prefix, trunk=trunk, backend=backend)
            torch.testing.assert_close(got, whole[:, start:end], rtol=1e-10, atol=1e-10)


def test_cached_softmax_scale() -> None:
    q, k, v = projections(2, 4)
    got = cached_attention(q, k, v, softmax_scale=0.3)
    torch.testing.assert_close(got, dense(q, k, v, ScaleSchedule((2,)), softmax_scale=0.3))


def wrong_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to (the start of the message, what differs from a valid call)."""
    q, k, v = projections(4, 5)
    short, narrow = k[:, :4], k[..., :4]
    return {
        "q of another length": ("q: expected shape", {"q": q[:, :3], "k": k[:, :3], "v": v[:, :3]}),
        "q flat": ("q: expected shape", {"q": q.flatten(2)}),
        "q integers": ("q: expected a floating-point", {"q": q.long()}),
        "k short": ("k: expected shape", {"k": short}),
        "k narrow": ("k: expected shape", {"k": narrow}),
        "v short": ("v: expected shape", {"v": short}),
        "k in float32": ("k: expected torch.float64", {"k": k.float()}),
        "v on another device": ("v: expected torch.float64 on cpu", {"v": v.to("meta")}),
        "prefix of another width": (r"prefix\.k: expected shape", {"prefix": PrefixKV(narrow, narrow)}),
        "prefix v": (r"prefix\.v: expected shape", {"prefix": PrefixKV(k, short)}),
        "prefix in float32": (r"prefix\.k: expected torch.float64", {"prefix": PrefixKV(k.float(), v.float())}),
        "prefix rows": (r"prefix\.k: .* divides the batch 4, got 3", {"prefix": shared(3)}),
        "prefix without rows": (r"prefix\.k: .* divides the batch 4, got 0", {"prefix": shared(0)}),
        "lengths": (r"prefix\.lengths: expected shape", {"prefix": shared(2, [1, 2, 3])}),
        "lengths elsewhere": (
            r"prefix\.lengths: expected cpu",
            {"prefix": PrefixKV(k, v, torch.ones(4).int().to("meta"))},
        ),
        "lengths as floats": (r"prefix\.lengths: expected int64", {"prefix": PrefixKV(k, v, torch.ones(4))}),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_arguments(name: str) -> None:
    message, change = wrong_calls()[name]
    q, k, v = projections(4, 5)
    schedule = ScaleSchedule((1, 2))
    with pytest.raises(ValueError, match=f"^block_causal_attention: {message}"):
        block_causal_attention(**{"q": q, "k": k, "v": v, "schedule": schedule, **change})
    if name not in ("q of another length", "k short"):  # these are right for a cache
        with pytest.raises(ValueError, match=f"^cached_attention: {message}"):
            cached_attention(**{"q": q, "k": k, "v": v, **change})


def test_wrong_schedule_and_trunk() -> None:
    q, k, v = projections(4, 5)
    with pytest.raises(ValueError, match="block_causal_attention: schedule: expected a ScaleSchedule, got tuple"):
        block_causal_attention(q, k, v, (1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cached_attention: trunk\.k: .* divides the batch 4, got 3"):
        cached_attention(q, k, v, trunk=shared(3))
    with pytest.raises(ValueError, match=r"cached_attention: trunk\.lengths: expected None"):
        cached_attention(q, k, v, trunk=shared(2, [1, 1]))
