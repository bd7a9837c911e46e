"""The kernels of log-probabilities and of the losses made of them, compiled for GPUs that are not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Compiled, Launch, compile_for, launches_of
from fastvar.kernels.token_log_probs import impl_triton as scores
from fastvar.kernels.token_log_probs import policy_triton as policy
from fastvar.kernels.token_log_probs.losses import Scoring, Wanted

from fastvar import ScaleSchedule
from fastvar.ops.cross_entropy import CrossEntropyCall
from fastvar.ops.policy_loss import Objective, PolicyLossCall
from fastvar.ops.token_log_probs import Head

SHARED = 99 * 1024  # bytes that a block may have on any card from compute capability 8.0 on
# Bytes of a thread's registers that lie in memory instead: of rows of 16384 logits that hold the reference's as well,
# whose 512 threads have 128 registers each, and of all others.
STACK, FEW = 16, 0
SIZES = (2000, 4096, 16384, 32768)
CAPABILITIES = (80, 90, 100)
WAYS = ("scores", "given", "policy", "cross-entropy")


def launches(
    way: str,
    size: int = 4096,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head: torch.dtype | None = None,
    bits: bool = False,
    logits: bool = False,
    kl: bool = False,
    scales: tuple[int, ...] = (1, 2),
) -> list[Launch]:
    """Of the kernels over logits, for the tokens of a sample."""
    schedule, width = ScaleSchedule(scales), 1024
    rows = (1, schedule.num_tokens)
    hidden = torch.empty(*rows, size if logits else width, dtype=dtype)
    weight, bias = (torch.empty(*s, dtype=head or dtype) for s in ((size, width), (size,)))
    tokens = torch.empty(*rows, size, dtype=torch.bool) if bits else torch.zeros(rows, dtype=torch.int64)
    own = Head(hidden) if logits else Head(hidden, weight, bias)
    other = own if kl else None
    needs = tuple([t is not None for t in own])
    values = torch.empty(rows)
    objective = ("token", 0.1, "exact", 0.1) if kl else ("token", 0.1, "k3", 0.0)
    reference = None if kl else values
    settings = Objective(
        values, reference, values[:, 0], None, None, schedule, 0, 0.6, "per_scale", 0.2, 0.2, *objective
    )

    def call() -> None:
        if way == "scores":
            scores.score(Scoring(own, tokens, other))
        elif way == "given":
            grads = [values, None, values if kl else None, None]
            scores.gradients(Scoring(own, tokens, other), (), grads, Wanted(*needs))
        elif way == "policy":
            scores.policy_loss(PolicyLossCall(own, tokens, other, 1.0, needs, settings))
        else:
            scores.cross_entropy(CrossEntropyCall(own, tokens, None, 0.1, needs))

    with pytest.MonkeyPatch.context() as patch:  # products take long
        patch.setattr(scores, "_wide_product", lambda a, b, out=None: torch.empty(len(a), b.shape[1]))
        patch.setattr(scores._Gradients, "add", lambda *_: None)
        found = launches_of(call)
    found = [launch for launch in found if launch.kernel.__name__ in ("_tokens", "_bits")]
    assert len(found) == 1
    return found


def layouts(found: Compiled) -> set[str]:
    """How the tiles that are summed lie over the threads."""
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", found.ttgir, re.MULTILINE))
    tiles = re.findall(r"tensor<(\d+x\d+)xf32, (#\w+)>\) -> tensor", found.ttgir)
    return {f"{shape} {named[layout]}" for shape, layout in tiles}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_logits(size: int, capability: int) -> None:
    """No spills, logits and slopes in accesses of 16 bytes, and sums that training adds up as scoring does."""
    orders = set()
    for way in WAYS:
        for kl in (False, True) if way != "cross-entropy" else (False,):
            found = compile_for(launches(way, size, kl=kl)[0], capability)
            where = f"{way}, {size}, sm_{capability}: {found._replace(ptx='', ttgir='')}"
            assert found.stack <= (STACK if kl and size == 16384 else FEW) and found.shared <= SHARED, where
            assert "ld.global.v4.b32" in found.ptx and "st.global.v4.b32" in found.ptx, where
            # but for the bias of the token itself, in each row of a program
            rows = max(4096 // size, 1)
            assert len(re.findall(r"(ld|st)\.global\.[\w:.]*b(8|16)\b", found.ptx)) <= rows, where
            orders |= layouts(found)
    alone = launches("scores", size, scales=(1,))[0]  # a token is scored alone as beside others
    orders |= layouts(compile_for(alone, capability))
    assert len(orders) == 1, orders


CASES: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32 head": {"head": torch.float32},
    "bits": {"size": 32, "bits": True},
    "float32 bits": {"size": 32, "bits": True, "dtype": torch.float32},
    "logits": {"logits": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_other_kinds_of_logits(case: str) -> None:
    orders = set()
    for way in WAYS:
        if case != "float16" or way != "policy":  # takes two passes
            for kl in (False, True) if way != "cross-entropy" else (False,):
                found = compile_for(launches(way, **CASES[case], kl=kl)[0], 90)
                where = f"{way}, {case}: {found._replace(ptx='', ttgir='')}"
                assert found.stack <= FEW and found.shared <= SHARED, where
                orders |= layouts(found)
    assert len(orders) == 1, orders


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("level", ["token", "scale"])
def test_policy(level: str, capability: int) -> None:
    schedule = ScaleSchedule.parse("var-256")
    values, gains = torch.empty(8, schedule.num_tokens), torch.empty(8)
    rest = (schedule, 1, 0.6, "per_scale", 0.2, 0.2, level, 0.1, "k3", 0.1)
    settings = Objective(values, values, gains, values, None, *rest)

    def call() -> None:
        objective = policy.Policy(values.shape, values.device, settings)
        objective.measure(values, values, None, values)

    found = launches_of(call)
    assert len(found) == (4 if level == "token" else 5)
    for launch in found:
        compiled = compile_for(launch, capability)
        assert compiled.stack == 0 and compiled.shared <= SHARED, (launch.kernel.__name__, compiled._replace(ptx=""))
