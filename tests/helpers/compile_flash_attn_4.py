"""Compiles what fastvar asks of the package flash-attn-4, for a GPU that is not there.

`python -m tests.helpers.compile_flash_attn_4 MAJOR WIDTH...` is for a compute capability MAJOR.0 and head dimensions;
tensors have no values. In a process of its own: it stands in for what the package asks a driver for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvar import ScaleSchedule
from fastvar.ops import PrefixKV
from fastvar.ops.block_causal_attention import AttentionCall

SCHEDULE = ScaleSchedule((1, 5, 9, (10, 15)))
BF16 = torch.bfloat16
# rows of prefixes, their tokens, whether they have lengths of their own, whether algorithms are to be deterministic
CALLS = {
    "without a prefix": (0, 0, False, False),
    "with a prefix": (2, 140, False, False),
    "with lengths": (2, 140, True, False),
    "with many lengths": (257, 3, True, False),
    "deterministic": (2, 140, True, True),
}


class Hardware:
    """Stands in for cutlass.utils.HardwareInfo: an H200's multiprocessors."""

    def __init__(self, *args: Any) -> None: ...

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return 132 // cluster_size

    def get_device_multiprocessor_count(self) -> int:
        return 132


def main(major: int, widths: list[int]) -> None:
    card = f"sm_{major}0"
    os.environ |= {"FLASH_ATTENTION_ARCH": card, "CUTE_DSL_ARCH": f"{card}a", "FLASH_ATTENTION_NUM_SMS": "132"}
    import cutlass.utils

    cutlass.utils.HardwareInfo = Hardware  # before the package takes it from there
    from fastvar.kernels.block_causal_attention.by_scale import ByScale
    from fastvar.kernels.block_causal_attention.flash_attn_4 import FlashAttention4
    from flash_attn.cute import cute_dsl_utils, utils

    # the original wants memory
    utils.convert_from_dlpack_leading_static = lambda t, leading_dim, alignment, stride_order: (
        cute_dsl_utils.to_cute_tensor(t, alignment, leading_dim)
    )
    attention = ByScale(FlashAttention4(major))
    with FakeTensorMode():
        for width in widths:
            for name, (rows, tokens, ragged, deterministic) in CALLS.items():
                torch.use_deterministic_algorithms(deterministic)
                q, k, v = torch.empty(max(rows, 2), SCHEDULE.num_tokens, 3, 2, width, dtype=BF16, device="cuda").unbind(
                    2
                )
                prefix = None
                if rows:
                    lengths = torch.empty(rows, dtype=torch.int64, device="cuda") if ragged else None
                    prefix = PrefixKV(*torch.empty(2, rows, tokens, 2, width, dtype=BF16, device="cuda"), lengths)
                call = AttentionCall(q, k, v, SCHEDULE, prefix, 0.3, False)
                out, lse = attention.forward(call)
                found = attention.backward(call, (out, lse), (out, None), None)
                assert out.shape == q.shape and found["q"].shape == q.shape
                print(f"{card}, {width} channels, {name}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(width) for width in sys.argv[2:]])
