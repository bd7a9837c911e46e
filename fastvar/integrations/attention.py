"""The functions of attention packages that the public code calls, made of PyTorch's own attention: with the arguments
of theirs, for any device and dtype. What they cannot do raises NotImplementedError."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def padded(
    packed: torch.Tensor, ends: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Packed sequences as rows of equal length; nothing waits for the device.

    Args:
        packed: (T, ...), the rows of one sequence after those of the other.
        ends: (B + 1,) integers, 0 and where each sequence ends.
        longest: N, the most rows of a sequence.

    Returns:
        (B, N, ...), the packed row that each place holds (B, N), and whether it is one of the sequence's own (B, N).
        The latter two are None if nothing is padded.
    """
    count = len(ends) - 1
    if count * longest == len(packed):
        return packed.unflatten(0, (count, longest)), None, None
    rows = ends[:-1, None] + torch.arange(longest, device=packed.device)
    return packed[rows.clamp_max(len(packed) - 1)], rows, rows < ends[1:, None]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """As flash-attn's: q (B, n, H, D) to k and v (B, S, H', D), H' dividing H; (B, n, H, D)."""
    _refuse("flash_attn_func", window_size, softcap, alibi_slopes, return_attn_probs)
    mask = _causal(q.shape[1], k.shape[1], q.device) if causal else None
    return _attend(q, k, v, mask, dropout_p, softmax_scale)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """As flash-attn's: packed queries (sum of n, H, D) to packed keys and values (sum of S, H', D)."""
    _refuse("flash_attn_varlen_func", window_size, softcap, alibi_slopes, return_attn_probs)
    if causal:
        raise NotImplementedError("flash_attn_varlen_func: causal: expected False without flash-attn, got True")
    queries, _, own = padded(q, cu_seqlens_q, max_seqlen_q)
    (keys, _, valid), (values, _, _) = (padded(t, cu_seqlens_k, max_seqlen_k) for t in (k, v))
    mask = None if valid is None else valid[:, None, None]
    out = _attend(queries, keys, values, mask, dropout_p, softmax_scale)
    if own is None:
        return out.flatten(0, 1)
    # where each packed row lies among the padded ones
    text = torch.searchsorted(cu_seqlens_q[1:].contiguous(), torch.arange(len(q), device=q.device), right=True)
    return out[text, torch.arange(len(q), device=q.device) - cu_seqlens_q[text]]


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """As flash-attn's: packed queries (sum of n, H, D) to packed keys and values (sum of S, 2, H', D)."""
    k, v = kv.unbind(1)
    options |= {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """As xFormers': (B, n, H, D) to (B, S, H, D), a bias that broadcasts to (B, H, n, S) added to the scores."""
    if attn_bias is not None and not isinstance(attn_bias, torch.Tensor):
        raise NotImplementedError(
            f"memory_efficient_attention: attn_bias: expected a tensor or None without xFormers, got {attn_bias!r}"
        )
    return _attend(query, key, value, attn_bias, p, scale)


# -- flash_attn.ops ----------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As `flash_attn.ops.rms_norm`'s."""
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def rms_norm_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float, use_quant: bool = False
) -> None:
    """As `hart_backend.fused_kernels.rms_norm`, which writes into `out` and has no gradient."""
    if use_quant:
        raise NotImplementedError("rms_norm: use_quant: expected False without HART's extension, got True")
    out.copy_(F.rms_norm(x.detach(), (x.shape[-1],), weight, epsilon))


def fused_mlp_func(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    activation: str = "gelu_approx",
    **how: Any,
) -> torch.Tensor:
    """As `flash_attn.ops.fused_dense`'s; `how` it goes about it is left out."""
    if activation != "gelu_approx" or how.get("return_residual"):
        raise NotImplementedError(
            f"fused_mlp_func: activation: expected gelu_approx without flash-attn, got {activation}"
        )
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def not_there(*arguments: Any, **options: Any) -> Any:
    """What the public code imports and does not call."""
    raise NotImplementedError("flash_attn: this function is not there without the package")


# -- what they share ---------------------------------------------------------------------------------------------------


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    shared = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()  # callers view it as (B, n, H D)


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(n, S): the last query sees all keys, as flash-attn has it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _refuse(
    function: str, window: tuple[int, int], softcap: float, slopes: torch.Tensor | None, probabilities: bool
) -> None:
    for name, given, can in (
        ("window_size", tuple(window), (-1, -1)),
        ("softcap", softcap, 0.0),
        ("alibi_slopes", slopes, None),
        ("return_attn_probs", probabilities, False),
    ):
        if given is not None and given != can:
            raise NotImplementedError(f"{function}: {name}: expected {can} without flash-attn, got {given}")
