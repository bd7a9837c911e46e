"""Triton's kernels as they are shipped, compiled for GPUs that are not there: they fit without spilling, use the matrix
units, and move memory 16 bytes a thread and instruction.

Every kernel is compiled for cards of compute capability 8.0, 9.0 and 10.0, in the cases that tell these apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastvar.kernels.common.tiling import SHARED, family_of

from fastvar import ScaleSchedule, ops
from fastvar.ops import PrefixKV
from fastvar.ops._dispatch import REGISTRY
from tests.helpers.ahead_of_time import Compiled, Launch, accesses, compile_for, launches_of
from tests.helpers.samples import SAMPLES, moved

pytestmark = pytest.mark.slow
VAR_256 = ScaleSchedule.parse("var-256")
BF16, F16, F32, INT64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
WIDE = 16


def empty(*shape: int, dtype: torch.dtype = BF16, gradient: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=gradient)


def fits(launch: Launch, capability: int, *, stack: int = 0, shared: int | None = None) -> Compiled:
    """No more bytes of a thread's registers lie in memory, with triton 3.6 and 3.8, nor more of a block's shared memory
    are taken; by default none, and what the card has."""
    found = compile_for(launch, capability)
    limit = SHARED[family_of(divmod(capability, 10))] if shared is None else shared
    where = f"{launch.kernel.__name__}, sm_{capability}: {found._replace(ptx='', ttgir='')}"
    assert found.stack <= stack and found.shared <= limit, where
    return found


def multiplies(found: Compiled, instruction: str) -> bool:
    """Whether all products are that instruction's."""
    return instruction in found.ptx and not any(each in found.ptx for each in {*MATRIX.values()} - {instruction})


# Operators with cases of their own below, and all others.
OWN_CASES = (
    "block_causal_attention", "cached_attention", "adaptive_layer_norm", "gated_residual", "gated_residual_norm",
    "qk_norm_rope", "qk_norm_rope_into_cache", "group_norm_silu", "sample_tokens", "token_log_probs", "cross_entropy",
    "policy_loss", "residual_quantize", "accumulate_scale",
)  # fmt: skip
OTHERS = [name for name in REGISTRY if name not in OWN_CASES and "triton" in {row.backend for row in REGISTRY[name]}]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", OTHERS)
def test_calls_of_the_contract(name: str, capability: int) -> None:
    launches = []
    for function, arguments, differentiable in SAMPLES[name](BF16):
        given = {key: moved(value, "meta") for key, value in arguments.items()}
        for key in differentiable:
            given[key].requires_grad_()
        launches += launches_of(partial(function, **given, backend="triton"), capability)
    assert launches
    for launch in launches:
        fits(launch, capability)


def attention(
    head_dim: int, dtype: torch.dtype, capability: int, schedule: ScaleSchedule = VAR_256, block_diagonal: bool = False
) -> list[Launch]:
    """Forward and backward, over a prefix of some length, with gradients of everything."""

    def call() -> Any:
        q, k, v = (empty(2, schedule.num_tokens, 2, head_dim, dtype=dtype, gradient=True) for _ in range(3))
        shared = (empty(1, 70, 2, head_dim, dtype=dtype, gradient=True) for _ in range(2))
        prefix = PrefixKV(*shared, empty(1, dtype=INT64))
        return ops.block_causal_attention_with_lse(
            q, k, v, schedule, prefix=prefix, block_diagonal=block_diagonal, backend="triton"
        )

    return launches_of(call, capability)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "block_diagonal"),
    [
        (80, 64, BF16, False),
        (89, 128, BF16, False),  # with least shared memory
        (90, 128, BF16, False),
        (100, 128, BF16, False),
        (90, 64, BF16, True),
        (90, 104, F16, False),
        (90, 128, F32, False),
    ],
)
def test_attention(capability: int, head_dim: int, dtype: torch.dtype, block_diagonal: bool) -> None:
    """Halves are loaded 16 bytes at a time whatever the head dimension."""
    launches = attention(head_dim, dtype, capability, block_diagonal=block_diagonal)
    kernels = ("fwd", "bwd_dq", "bwd_dk_dv", "bwd_prefix", "bwd_prefix_sum")
    assert [launch.kernel.__name__ for launch in launches] == [f"block_causal_attention_{k}_kernel" for k in kernels]
    for launch in launches[:4]:
        found = fits(launch, capability, stack=64)
        assert multiplies(found, MATRIX[80 if dtype == F32 else capability])
        if dtype != F32 and capability == 90:
            tile = launch.named["BLOCK_D"] * min(launch.named["BLOCK_M"], launch.named["BLOCK_N"])
            moved = accesses(found.ptx)
            assert moved["ld", WIDE] >= 4 * tile // 8 // (32 * launch.named["num_warps"]), moved
    fits(launches[4], capability)


def test_long_rows_by_descriptors() -> None:
    """Keys and values that nothing masks come by bulk copies, and products overlap with them."""
    launch = attention(128, BF16, 90, ScaleSchedule.parse("infinity-1M-1.000"))[0]
    assert launch.named["BLOCK_M"] == launch.named["BLOCK_N"] == 128
    found = fits(launch, 90, stack=64)
    assert multiplies(found, MATRIX[90])
    assert found.ptx.count("cp.async.bulk.tensor") >= 4  # of the prefix and of the own


@pytest.mark.parametrize(
    ("capability", "n", "head_dim"), [(90, 1, 64), (80, 25, 64), (89, 256, 128), (90, 256, 128), (100, 256, 128)]
)
def test_cached_attention(capability: int, n: int, head_dim: int) -> None:
    """One scale's queries to a ragged prefix, a trunk and own keys."""

    def call() -> torch.Tensor:
        q, keys, shared = empty(4, n, 2, head_dim), empty(4, 680, 2, head_dim), empty(2, 680, 2, head_dim)
        prefix, trunk = PrefixKV(shared, shared, empty(2, dtype=INT64)), PrefixKV(shared, shared)
        return ops.cached_attention(q, keys, keys, prefix=prefix, trunk=trunk, backend="triton")

    launches = launches_of(call, capability)
    merge = "cached_attention_fwd_merge_kernel"
    assert {launch.kernel.__name__ for launch in launches} == {"cached_attention_fwd_kernel", merge}
    for launch in launches:
        found = fits(launch, capability, stack=64)
        # Hopper's and Blackwell's own instructions take 64 rows and more
        assert launch.kernel.__name__ == merge or multiplies(found, MATRIX[80 if n < 64 else capability])


def moves(launch: Launch, found: Compiled, loads: int, stores: int) -> None:
    """So many tiles are loaded and stored in wide accesses. There are but a few narrow ones, of what is loaded once a
    row or once a program."""
    first = launch.arguments[0]
    few = 2 * first.element_size()  # a thread holds more rows of a wider type
    width = launch.named["BLOCK_D"] if "BLOCK_D" in launch.named else launch.named["BLOCK"]
    tile = launch.named["ROWS"] * width * first.element_size()
    each, moved = tile // (WIDE * 32 * launch.named["num_warps"]), accesses(found.ptx)
    where = f"{launch.kernel.__name__}: {dict(moved)}"
    assert each >= 1 and moved["ld", WIDE] >= loads * each and moved["st", WIDE] >= stores * each, where
    assert sum(number for (_, size), number in moved.items() if size < WIDE) <= few, where


def hold(launches: Sequence[Launch], capability: int, tiles: dict[str, tuple[int, int]]) -> None:
    """Each fits on all cards, and those that are named load and store so many tiles, in a loop some while they work on
    others."""
    assert {launch.kernel.__name__ for launch in launches} >= set(tiles)
    for launch in launches:
        found = fits(launch, capability, shared=SHARED["sm80"])
        if capability == 90 and launch.kernel.__name__ in tiles:
            moves(launch, found, *tiles[launch.kernel.__name__])
            left = [int(number, 0) for number in re.findall(r"cp\.async\.wait_group\s+(\w+)", found.ptx)]
            assert not left or max(left) > 0, f"{launch.kernel.__name__}: it waits for all loads, {left}"
            assert left or launch.kernel.__name__ != "adaptive_layer_norm_bwd_kernel"  # or it has none on their way


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "modulation"),
    [
        (80, BF16, 256, BF16),
        (90, BF16, 1024, F32),
        (90, BF16, 1920, BF16),
        (90, F32, 1024, BF16),
        (100, BF16, 2048, F32),
    ],
)
def test_rows_of_channels(capability: int, dtype: torch.dtype, width: int, modulation: torch.dtype) -> None:
    def made() -> list[torch.Tensor]:
        # modulations as models hand them over: neighbours in one tensor
        rows = [empty(2, 70, width, dtype=dtype, gradient=True) for _ in range(2)]
        return rows + list(empty(2, 6, width, dtype=modulation, gradient=True).unbind(1)[2:5])

    def norm() -> torch.Tensor:
        x, _, _, scale, shift = made()
        return ops.adaptive_layer_norm(x, scale, shift, backend="triton")

    def residual() -> torch.Tensor:
        x, y, gate, *_ = made()
        return ops.gated_residual(x, y, gate, backend="triton")

    norms = [f"adaptive_layer_norm_{way}_kernel" for way in ("fwd", "bwd")]
    gates = [f"gated_residual_{way}_kernel" for way in ("fwd", "bwd")]
    hold(launches_of(norm, capability), capability, dict(zip(norms, [(1, 1), (2, 1)], strict=True)))
    hold(launches_of(residual, capability), capability, dict(zip(gates, [(2, 1), (2, 1)], strict=True)))
    both = launches_of(lambda: ops.gated_residual_norm(*made(), backend="triton"), capability)
    hold(both, capability, dict(zip(norms, [(2, 2), (4, 2)], strict=True)))


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "norm", "turn"),
    [
        (80, BF16, 64, True, True),
        (90, BF16, 64, False, True),
        (90, BF16, 104, True, False),
        (90, BF16, 120, True, False),
        (90, BF16, 128, True, True),
        (90, F32, 104, True, False),
        (90, F32, 64, True, True),
        (100, BF16, 120, True, True),
    ],
)
def test_heads(capability: int, dtype: torch.dtype, head_dim: int, norm: bool, turn: bool) -> None:
    """Slices of one projection. With tables pairs are taken apart in registers. The rows of a head lie together in the
    cache."""

    def options() -> dict[str, Any]:
        tables = tuple(empty(9, head_dim // 2, dtype=F32) for _ in range(2))
        return {"log_scale": empty(6, dtype=F32) if norm else None, "rope": tables if turn else None}

    def plain() -> Any:
        q, k = empty(2, 9, 2, 6, head_dim, dtype=dtype, gradient=True).unbind(2)
        return ops.qk_norm_rope(q, k, **options(), backend="triton")

    def into_cache() -> torch.Tensor:
        caches = empty(2, 2, 6, 20, head_dim, dtype=dtype).transpose(2, 3)
        heads = empty(2, 9, 3, 6, head_dim, dtype=dtype).unbind(2)
        return ops.qk_norm_rope_into_cache(*heads, *caches, 3, **options(), backend="triton")

    forward, backward = (f"qk_norm_rope_{way}_kernel" for way in ("fwd", "bwd"))
    hold(launches_of(plain, capability), capability, {forward: (2, 2), backward: (4, 2)})
    hold(launches_of(into_cache, capability), capability, {forward: (3, 3)})


def test_narrow_accesses_are_seen() -> None:
    """Rows that do not begin at multiples of 16 bytes cannot be loaded so."""
    with pytest.raises(AssertionError, match="qk_norm_rope_fwd_kernel"):
        test_heads(90, BF16, 12, True, False)


@pytest.mark.parametrize(
    ("capability", "channels", "dtype"),
    [(80, 160, BF16), (90, 640, BF16), (100, 160, BF16), (90, 128, F32), (80, 320, F32)],
)
def test_group_norm(capability: int, channels: int, dtype: torch.dtype) -> None:
    """The kernels over rows move memory; the others add up small sums."""

    def call() -> torch.Tensor:
        x, weight = empty(2, 4096, channels, dtype=dtype, gradient=True), empty(channels, dtype=F32, gradient=True)
        return ops.group_norm_silu(x, weight, weight, groups=32, shift=weight, backend="triton")

    launches = launches_of(call, capability)
    results = {"group_norm_silu_fwd_kernel", "group_norm_silu_bwd_kernel"}
    rows = {*results, "group_norm_silu_fwd_moments_kernel", "group_norm_silu_bwd_sums_kernel"}
    assert rows <= {launch.kernel.__name__ for launch in launches}
    for launch in launches:
        found, name = fits(launch, capability), launch.kernel.__name__
        if name in rows:
            moved = accesses(found.ptx)
            wide = sum(count for (_, size), count in moved.items() if size >= WIDE)
            # narrow is only what there is one of for each channel
            assert wide >= 4 and sum(moved.values()) - wide <= 6, (name, moved)
            assert all(size >= WIDE for way, size in moved if name in results and way == "st"), moved


def sampling(dtype: torch.dtype, size: int, capability: int, **options: Any) -> Launch:
    def call() -> Any:
        logits = empty(2, 3, size, dtype=dtype)
        return ops.sample_tokens(
            logits, unconditional=logits, guidance=1.5, seeds=empty(2, dtype=INT64), backend="triton", **options
        )

    (launch,) = launches_of(call, capability)
    return launch


@pytest.mark.parametrize(
    ("capability", "size", "dtype"),
    [(80, 4096, F32), (90, 50, F32), (90, 4096, BF16), (90, 16384, F32), (80, 32768, F32), (100, 32768, F32)],
)
def test_sampled_tokens(capability: int, size: int, dtype: torch.dtype) -> None:
    """Rows of logits stay in registers: a block shares sums of warps. Both halves of a row are loaded, then a block
    again."""
    launch = sampling(dtype, size, capability, temperature=0.9, top_k=30, top_p=0.96, position=5, log_probs=True)
    found = fits(launch, capability, stack=400 if size > 16384 else 0, shared=4096)
    assert size > 4096 or found.registers <= 96  # so that there are enough rows at a time
    if capability == 90 and size >= 4096:
        moved, element = accesses(found.ptx), 4 if dtype == F32 else 2
        assert moved["ld", WIDE] >= 2 * size * element // (WIDE * 32 * launch.named["num_warps"]), moved
        assert sum(moved.values()) - moved["ld", WIDE] <= 6, moved


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_guidance_is_rounded_as_on_a_cpu(dtype: torch.dtype) -> None:
    """No multiplication is fused with an addition, where nothing else would be."""
    assert "fma." not in compile_for(sampling(dtype, 1000, 90, position=5), 90).ptx


@pytest.mark.parametrize("capability", [80, 100])
def test_sampled_bits_and_masks(capability: int) -> None:
    def call() -> Any:
        logits, mask = empty(2, 40, 32, dtype=F32), empty(2, 16, 16, dtype=F32)
        ops.propagate_mask(mask, VAR_256, footprint="support", soft=True, backend="triton")
        ops.propagate_mask(mask > 0, VAR_256, backend="triton")
        options: dict[str, Any] = {"guidance": 3.0, "temperature": 0.5, "top_p": 0.97, "position": 5, "log_probs": True}
        return ops.sample_bits(logits, unconditional=logits, seeds=empty(2, dtype=INT64), **options, backend="triton")

    launches = launches_of(call, capability)
    assert len(launches) == 3
    for launch in launches:
        fits(launch, capability, shared=4096)


ANY_CARD = 99 * 1024  # bytes that a block may have on any card from compute capability 8.0 on


def over_logits(
    capability: int,
    size: int = 4096,
    *,
    dtype: torch.dtype = BF16,
    head: torch.dtype | None = None,
    bits: bool = False,
    logits: bool = False,
    policy: bool = True,
    scales: tuple[int, ...] = (1, 2),
) -> list[tuple[Launch, bool]]:
    """The kernels over logits for the tokens of a sample: of log-probabilities and their gradients, of the losses, all
    but the last also with a reference for an exact KL, and whether it is one of these."""
    schedule = ScaleSchedule(scales)
    rows = (1, schedule.num_tokens)

    def problem() -> list[torch.Tensor | None]:
        hidden = empty(*rows, size if logits else 1024, dtype=dtype, gradient=True)
        made = [(size, 1024), (size,)]
        rest = [None if logits else empty(*shape, dtype=head or dtype, gradient=True) for shape in made]
        return [hidden, *rest, empty(*rows, size, dtype=torch.bool) if bits else empty(*rows, dtype=INT64)]

    def scored(kl: bool) -> Any:
        own = problem()
        found = ops.token_log_probs(*own, reference_head=tuple(own[:3]) if kl else None, backend="triton")
        return [found.log_probs, found.kl]

    def loss(kl: bool) -> Any:
        own, values = problem(), empty(*rows, dtype=F32)
        *head, tokens = own
        reference: dict[str, Any] = {"reference_head": tuple(head)} if kl else {"reference_log_probs": values}
        options = ops.PolicyLossOptions(
            panw_normalisation="per_scale",
            kl_weight=0.1,
            kl_estimator="exact" if kl else "k3",
            entropy_weight=0.1 if kl else 0.0,
        )
        return ops.policy_loss(
            tuple(head), tokens, values[:, 0], schedule, options, old_log_probs=values, **reference, backend="triton"
        )

    calls = [(scored, kl) for kl in (False, True)] + [(loss, kl) for kl in (False, True) if policy]
    launches = [(each, kl) for call, kl in calls for each in launches_of(lambda call=call, kl=kl: call(kl), capability)]
    entropy = launches_of(lambda: ops.cross_entropy(*problem(), label_smoothing=0.1, backend="triton"), capability)
    launches = [(each, kl) for each, kl in [*launches, *((each, False) for each in entropy)]]
    kernels = ("token_log_probs_fwd_kernel", "token_log_probs_fwd_bits_kernel")
    chosen = [(each, kl) for each, kl in launches if each.kernel.__name__ in kernels]
    assert len(chosen) == 5 + 2 * policy
    return chosen


def orders(found: Compiled) -> set[str]:
    """How the tiles that are summed lie over the threads."""
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", found.ttgir, re.MULTILINE))
    tiles = re.findall(r"tensor<(\d+x\d+)xf32, (#\w+)>\) -> tensor", found.ttgir)
    return {f"{shape} {named[layout]}" for shape, layout in tiles}


@pytest.mark.parametrize(("capability", "size"), [(90, 2000), (80, 4096), (90, 16384), (100, 16384), (80, 32768)])
def test_rows_of_logits(capability: int, size: int) -> None:
    """Logits and slopes in accesses of 16 bytes, and sums that training adds up as scoring does."""
    seen = set()
    for launch, kl in over_logits(capability, size):
        # rows of 16384 logits that hold the reference's as well: their 512 threads have 128 registers each
        found = fits(launch, capability, stack=16 if kl and size == 16384 else 0, shared=ANY_CARD)
        assert "ld.global.v4.b32" in found.ptx and "st.global.v4.b32" in found.ptx
        # but for the bias of the token itself, in each row of a program
        assert len(re.findall(r"(ld|st)\.global\.[\w:.]*b(8|16)\b", found.ptx)) <= max(4096 // size, 1)
        seen |= orders(found)
    alone, _ = over_logits(capability, size, scales=(1,))[0]  # a token is scored alone as beside others
    assert len(seen | orders(compile_for(alone, capability))) == 1, seen


CASES: dict[str, dict[str, Any]] = {
    "float16": {"dtype": F16, "policy": False},  # which takes two passes
    "float32": {"dtype": F32},
    "float32 head": {"head": F32},
    "bits": {"size": 32, "bits": True},
    "logits": {"logits": True},
}


@pytest.mark.parametrize("case", CASES)
def test_other_kinds_of_logits(case: str) -> None:
    launches = over_logits(90, **CASES[case])
    seen = set().union(*(orders(fits(launch, 90, shared=ANY_CARD)) for launch, _ in launches))
    assert len(seen) == 1, seen


@pytest.mark.parametrize(("capability", "level"), [(80, "scale"), (90, "token"), (100, "scale")])
def test_policy_loss(capability: int, level: str) -> None:
    def call() -> Any:
        logits = empty(8, VAR_256.num_tokens, 64, gradient=True)
        values, tokens = empty(8, VAR_256.num_tokens, dtype=F32), empty(8, VAR_256.num_tokens, dtype=INT64)
        options = ops.PolicyLossOptions(
            panw_normalisation="per_scale", ratio_level=level, kl_weight=0.1, kl_estimator="k3", entropy_weight=0.1
        )
        return ops.policy_loss(
            logits, tokens, values[:, 0], VAR_256, options, old_log_probs=values, reference_log_probs=values,
            token_mask=values, first_scale=1, backend="triton",
        )  # fmt: skip

    launches = launches_of(call, capability)
    assert len(launches) >= (4 if level == "token" else 5)
    for launch in launches:
        fits(launch, capability, shared=ANY_CARD)


@pytest.mark.parametrize(("capability", "channels"), [(80, 8), (90, 3), (90, 64), (100, 32)])
def test_quantiser(capability: int, channels: int) -> None:
    """At the coarsest grid, one between, and the finest, whose rows are few and many. Products are in float32, not in
    TF32."""

    def call() -> Any:
        features, codebook = empty(2, channels, 16, 16, dtype=F32), empty(4096, channels, dtype=F32)
        return ops.residual_quantize(features, codebook, ScaleSchedule((1, (5, 7), 16)), backend="triton")

    launches = launches_of(call, capability)
    search, means, upsample = (f"residual_quantize_fwd_{part}_kernel" for part in ("search", "means", "upsample"))
    assert {launch.kernel.__name__ for launch in launches} == {search, means, upsample}
    for launch in launches:
        most = 80 if channels == 64 and launch.kernel.__name__ == means else 0  # of the coarsest grid
        found = fits(launch, capability, stack=most, shared=SHARED["sm80"])
        assert "tf32" not in found.ptx
        assert launch.kernel.__name__ != search or "fma.rn.f32" in found.ptx
