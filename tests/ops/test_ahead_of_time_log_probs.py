"""The kernels of log-probabilities and of the policy loss, compiled for GPUs that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Launch, compile_for, launches_of
from fastvar.kernels.policy_loss import impl_triton as losses
from fastvar.kernels.token_log_probs import impl_triton as scores

from fastvar import ScaleSchedule

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Bytes of a thread's registers that lie in memory instead, of the exact KL, which holds two tiles of logits, and of all
# others. The tiles are chosen for Hopper. A float32 reference, whose products are split in three, has to take those of
# a policy in 16 bits, and comes first, before the policy's logits need registers.
STACK, FEW = {80: 768, 90: 256, 100: 768}, 64
CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16, "width": 1920},
    "large vocabulary": {"dtype": torch.float16, "size": 32768, "mean": True},
    "exact KL": {"dtype": torch.bfloat16, "width": 1920, "kl": True},
    "exact KL, float32 reference": {"dtype": torch.bfloat16, "width": 1920, "kl": True, "other": torch.float32},
    "float32": {"dtype": torch.float32},
    "float32 head": {"dtype": torch.bfloat16, "head": torch.float32, "width": 2048},
    "bits": {"dtype": torch.bfloat16, "size": 32, "width": 2048, "bits": True, "kl": True},
    "logits": {"dtype": torch.bfloat16, "logits": True},
}


def score_launches(
    dtype: torch.dtype,
    head: torch.dtype | None = None,
    size: int = 4096,
    width: int = 1024,
    *,
    bits: bool = False,
    logits: bool = False,
    kl: bool = False,
    mean: bool = False,
    other: torch.dtype | None = None,
) -> list[Launch]:
    """Forward and backward, with gradients of everything; few rows, as products outside of kernels are computed."""
    hidden = torch.empty(2, 8, size if logits else width, dtype=dtype)
    weight, bias = torch.empty(size, width, dtype=head or dtype), torch.empty(size, dtype=head or dtype)
    tokens = torch.empty(2, 8, size, dtype=torch.bool) if bits else torch.empty(2, 8, dtype=torch.int64)
    own = (hidden, None, None) if logits else (hidden, weight, bias)
    reference = [None if t is None or not kl else t.to(other or t.dtype) for t in own]
    rest = (tokens, *reference, 1.0, mean)

    def call() -> None:
        results = scores.forward(*own, *rest)
        gradients = [results[0], results[1] if kl else None, results[2], results[3], None]
        scores.backward(gradients, *own, *rest, results, [True] * 3)

    return launches_of(call)


def loss_launches() -> list[Launch]:
    schedule = ScaleSchedule.parse("var-256")
    values, gains = torch.empty(8, schedule.num_tokens), torch.empty(8)
    settings = (schedule, 1, 0.6, "per_scale", 0.2, 0.2, "scale", 0.1, "k3", 0.1)
    return launches_of(lambda: losses.forward(values, values, None, values, values, gains, values, None, *settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "case"),
    [*((90, case) for case in CASES), *((c, case) for c in (80, 100) for case in ("bfloat16", "exact KL", "float32"))],
)
def test_token_log_probs(capability: int, case: str) -> None:
    options = CASES[case]
    launches = score_launches(**options)
    assert len(launches) == (2 if "bits" in options else 3)
    for launch in launches:
        found = compile_for(launch, capability)
        where = f"{launch.kernel.__name__}, sm_{capability}: {found._replace(ptx='')}"
        most = STACK[capability] if "kl" in options else FEW
        assert found.stack <= most and found.shared <= SHARED[capability], where
        product = launch.kernel.__name__ != "_merge" and "logits" not in options
        assert not product or MATRIX[capability] in found.ptx, where
        if product and options.get("other") == torch.float32:  # each step of 8 hidden values is multiplied three times
            assert found.ptx.count(".f32.tf32.tf32") == 3 * launch.named["OTHER_BLOCK_E"] // 8, where


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_policy_loss(capability: int) -> None:
    launches = loss_launches()
    assert len(launches) == 3
    for launch in launches:
        found = compile_for(launch, capability)
        assert found.stack == 0 and found.shared <= SHARED[80], (launch.kernel.__name__, found._replace(ptx=""))
