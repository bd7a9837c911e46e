"""Cosine attention's normalisation and rotary positions, against eager PyTorch (VAR, Infinity) and torch.compile."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from benchmarks.cases import Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import qk_norm_rope, rope_tables
from fastvar.ops.qk_norm_rope import Rope

OP = "qk_norm_rope"
MAX_LOG_SCALE = math.log(100)


def eager(
    q: torch.Tensor, k: torch.Tensor, *, log_scale: torch.Tensor, rope: Rope | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in VAR under autocast, which normalises in float32, and with rotary positions as in Infinity, which stacks
    queries and keys for them. The results are rounded to q's dtype, as attention does it there."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = log_scale.to(wide).clamp_max(MAX_LOG_SCALE).exp()[:, None]
    q = F.normalize(q.to(wide), dim=-1) * scale
    k = F.normalize(k.to(wide), dim=-1)
    if rope is not None:
        cos, sin = (table[:, None] for table in rope)  # [L, 1, D/2]
        even, odd = torch.stack((q, k)).unflatten(-1, (-1, 2)).unbind(-1)
        q, k = torch.stack((cos * even - sin * odd, sin * even + cos * odd), -1).flatten(-2).unbind()
    return q.to(dtype), k.to(dtype)


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape = MODELS[setting["model"]]
    size = (setting["batch"], shape.tokens, 3, shape.heads, shape.head_dim)
    q, k, _ = torch.randn(size, device=device).to(dtype).unbind(2)  # strided, as the projection leaves them
    log_scale = torch.linspace(0.0, 5.0, shape.heads, device=device)  # the last ones are above the clamp
    rope = rope_tables(shape.schedule, shape.head_dim, device=device) if setting["rope"] else None
    contenders, backend = own(OP, q, qk_norm_rope)
    contenders |= {"eager": eager, "torch.compile": compiled(eager, setting)}
    one_pass = q.numel() * q.element_size()
    return Problem(
        {"q": q, "k": k, "log_scale": log_scale, "rope": rope},
        contenders,
        backend=backend,
        gradients=("q", "k", "log_scale"),
        reference=eager,
        # log_scale's gradient cancels over all tokens: in float32 a plain sum is off by more than the usual band
        limit=1e-4 if dtype == torch.float32 else None,
        bytes=4 * one_pass,  # both in, both out; the tables and the scale are small
        training_bytes=10 * one_pass,  # then both again, their incoming gradients, and two gradients out
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "rope": False, "batch": 2, "dtype": "float32"},
            {"model": "tiny", "rope": True, "batch": 2, "dtype": "float32"},
        ],
        "cpu": [
            {"model": "VAR-d16", "rope": False, "batch": 2, "dtype": "float32"},
            {"model": "Infinity-2B-0.06M", "rope": True, "batch": 1, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "rope": False, "batch": 64, "dtype": "bfloat16"},
            {"model": "VAR-d30", "rope": False, "batch": 32, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "rope": True, "batch": 4, "dtype": "bfloat16"},
        ],
    },
    (*own_names(OP), "eager", "torch.compile"),
    build,
    training=True,
)
