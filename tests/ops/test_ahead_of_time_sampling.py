"""The sampler and the masks in Triton, compiled for GPUs that are not there: rows of logits stay in registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Compiled, compile_for, launches_of
from fastvar.kernels.propagate_mask import impl_triton as masks
from fastvar.kernels.sample_tokens import impl_triton as sampler

from fastvar import ScaleSchedule
from fastvar.ops.propagate_mask import PropagateMaskCall
from fastvar.ops.sample_tokens import SampleCall

SHARED = 4096  # bytes of a block: sums of warps, no logits
SPILLED = 400  # bytes of a thread with the largest rows, with triton 3.6 or 3.8


def sampling(dtype: torch.dtype, size: int, capability: int, *options: float) -> Compiled:
    """Options are guidance, temperature, top-k, top-p, position and log_probs."""
    logits = torch.empty(2, 3, size, dtype=dtype)
    [launch] = launches_of(lambda: sampler.tokens(SampleCall(logits, logits, torch.arange(2), *options)))  # type: ignore[arg-type]
    return compile_for(launch, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("size", [50, 4096, 16384, 32768])
def test_tokens(size: int, capability: int) -> None:
    found = sampling(torch.float32, size, capability, 1.5, 0.9, 30, 0.96, 5, True)
    assert found.stack <= (SPILLED if size > 16384 else 0) and found.shared <= SHARED, found._replace(ptx="")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_is_rounded_as_on_a_cpu(dtype: torch.dtype) -> None:
    """No multiplication is fused with an addition, where nothing else would be."""
    assert "fma." not in sampling(dtype, 1000, 90, 1.5, 1.0, 0, 1.0, 5, False).ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bits_and_masks(capability: int) -> None:
    logits, mask = torch.empty(2, 40, 32), torch.empty(2, 16, 16)
    schedule = ScaleSchedule.parse("var-256")
    launches = launches_of(
        lambda: sampler.bits(SampleCall(logits, logits, torch.arange(2), 3.0, 0.5, 2, 0.97, 5, True))
    )
    launches += launches_of(lambda: masks.forward(PropagateMaskCall(mask, schedule, "support", True)))
    launches += launches_of(lambda: masks.forward(PropagateMaskCall(mask > 0, schedule, "area", False)))
    assert len(launches) == 3
    for launch in launches:
        found = compile_for(launch, capability)
        assert found.stack == 0 and found.shared <= SHARED, (launch.kernel.__name__, found._replace(ptx=""))
