"""Scale-wise block-causal attention over an optional prefix that a group of samples shares."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from fastvar.ops import _checks
from fastvar.ops._choices import ANY, HALF, HOPPER, Choice
from fastvar.ops._dispatch import Implementation
from fastvar.ops._operator import Operator
from fastvar.ops._packages import Package, installed, package_implementation
from fastvar.ops._triton import triton_implementation
from fastvar.schedule import ScaleSchedule


class PrefixKV(NamedTuple):
    """Keys and values that a group of batch rows shares: batch row b reads row b // G.

    Attributes:
        k: (B/G, P, H, D), any strides.
        v: (B/G, P, H, D), any strides.
        lengths: (B/G,) int32 or int64, how many of the P tokens are valid, counted from the left; None for all. What
            stands in the others has no effect as long as it is finite, and its gradients are 0.
    """

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None = None


def check_shared(op: str, argument: str, shared: PrefixKV, q: torch.Tensor) -> None:
    """Check keys and values that rows share against queries q (B, n, H, D)."""
    _checks.shape(op, f"{argument}.k", shared.k, "rows", "P", q.shape[2], q.shape[3])
    _checks.shape(op, f"{argument}.v", shared.v, *shared.k.shape)
    _checks.same_dtype_and_device(op, "q", q, **{f"{argument}.k": shared.k, f"{argument}.v": shared.v})
    _checks.groups(op, f"{argument}.k", q.shape[0], shared.k.shape[0])
    if shared.lengths is not None:
        _checks.shape(op, f"{argument}.lengths", shared.lengths, shared.k.shape[0])
        _checks.integer(op, f"{argument}.lengths", shared.lengths)
        _checks.same_device(op, "q", q, **{f"{argument}.lengths": shared.lengths})


class AttentionCall(NamedTuple):
    """A call of `block_causal_attention`: q, k, v (B, L, H, D) and, of a prefix, keys and values (B/G, P, H, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    schedule: ScaleSchedule
    prefix: PrefixKV | None
    softmax_scale: float
    block_diagonal: bool

    @property
    def shared(self) -> tuple[bool, bool]:
        return self.prefix is not None, self.prefix is not None and self.prefix.lengths is not None


def _fake(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    q = call.q
    lse = torch.empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


_NAME = "block_causal_attention"
_package = partial(package_implementation, op=_NAME, saves=(0, 1))
# On Hopper no gradient compiles for 104 and 112; on Blackwell it takes up to 128, and 256.
_FLASH_ATTN_4 = Package(
    "flash-attn-4", "flash_attn_4", ("sm90", "sm100"), {"sm90": (104, 112), "sm100": tuple(range(136, 256, 8))}
)
_OPERATOR = Operator(
    _NAME,
    AttentionCall,
    results=2,
    fake=_fake,
    implementations=[
        triton_implementation(_NAME, verified=("H200 (before its last change)",), saves=(0, 1)),
        Implementation(
            "torch", f"fastvar.kernels.{_NAME}.impl_torch", devices=("cpu",), verified=("CPU",), saves=(0, 1)
        ),
        _package(
            "sdpa",
            (),
            (torch.float32, *HALF),
            devices=("cuda", "cpu"),
            head_dims=256,
            verified=("CPU", "H200 (before its last change)"),
        ),
        package_implementation("flex", (), (torch.float32, *HALF), op=_NAME, verified=("H200",)),
        _package(
            "flash_attn",
            (_FLASH_ATTN_4, Package("flash-attn", "flash_attn_2")),
            HALF,
            head_dims=256,
            ragged=installed("flash-attn-4"),
            verified=("H200: tests of flash-attn-4 failed",),
        ),
        _package("xformers", (Package("xformers", "impl_xformers"),), (torch.float32, *HALF), ragged=False),
        Implementation("reference", f"fastvar.kernels.{_NAME}.reference", verified=("CPU", "H200")),
    ],
    choices=[
        # Wide heads and long rows: cuDNN, which PyTorch calls there, needs five products where our kernels do seven,
        # and twice their memory. Measured at 128 channels and 10,521 tokens.
        Choice(
            "sdpa",
            {"sm90": "044712c"},
            HOPPER,
            dtypes=HALF,
            width=(97, 128),
            length=(4096, ANY),
            ragged=False,
            gradient=True,
            cudnn=True,
        ),
        Choice("triton", {"sm90": "044712c"}),
    ],
)


def block_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    prefix: PrefixKV | None = None,
    softmax_scale: float | None = None,
    block_diagonal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention in which a token of scale k sees the prefix and every token of scales <= k.

    Args:
        q, k, v: (B, L, H, D) with L = schedule.num_tokens, one floating dtype, any strides.
        schedule: the scales of the L tokens.
        prefix: tokens before the image that every sample of a group shares; read once a group, never copied by
            the fused implementations. Its gradients are summed over the group.
        softmax_scale: multiplies the scores; 1 / sqrt(D) by default.
        block_diagonal: a token sees the prefix and its own scale only (Switti, arXiv 2412.01819).
        backend: see `fastvar.support()`. "sdpa" (PyTorch's fused kernels), "flash_attn" (flash-attn) and "xformers" go
            a scale at a time, flash-attn-4, which "flash_attn" takes on Hopper and Blackwell, in one call. They read
            a prefix once a group and merge; prefixes of several lengths are beyond flash-attn and xFormers. "flex" is
            PyTorch's FlexAttention, compiled once a shape; it copies the prefix for every sample. Gradients by "sdpa",
            and by flash-attn-4 on Hopper, may differ in their last bits from run to run on a GPU; under
            `torch.use_deterministic_algorithms(True)` "auto" does not take "sdpa", and flash-attn-4 computes them a
            scale at a time, with the same bits.

    Returns:
        (B, L, H, D) in q's dtype, contiguous. Softmax statistics in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a batch that the prefix's rows do not divide, a prefix of
            several lengths that the backend asked for does not take.

    Source: VAR (arXiv 2404.02905); the subject prefix is DreamVAR's (arXiv 2601.22507).
    """
    return block_causal_attention_with_lse(
        q, k, v, schedule, prefix=prefix, softmax_scale=softmax_scale, block_diagonal=block_diagonal, backend=backend
    )[0]


def block_causal_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: ScaleSchedule,
    *,
    prefix: PrefixKV | None = None,
    softmax_scale: float | None = None,
    block_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_causal_attention`, and the logarithm of each softmax's sum (B, H, L) in float32 (float64 for float64), by
    which attention to other keys can be merged with this one. Both carry gradients."""
    _checks.schedule(_NAME, schedule)
    _checks.floating(_NAME, "q", q)
    _checks.shape(_NAME, "q", q, "B", schedule.num_tokens, "H", "D")
    _checks.shape(_NAME, "k", k, *q.shape)
    _checks.shape(_NAME, "v", v, *q.shape)
    _checks.same_dtype_and_device(_NAME, "q", q, k=k, v=v)
    if prefix is not None:
        check_shared(_NAME, "prefix", prefix, q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _OPERATOR(AttentionCall(q, k, v, schedule, prefix, scale, block_diagonal), backend)
    return out, lse
