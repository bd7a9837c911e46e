"""`qk_norm_rope` that writes into the cache while sampling, against eager PyTorch with torch.cat (VAR, Infinity) and
with the same preallocated cache, and against torch.compile.

Every contender returns the queries and all keys and values so far. Each has a cache of its own, with NaN where the new
tokens belong: nobody passes the check with rows that another one wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.qk_norm_rope import eager
from fastvar.ops import qk_norm_rope_into_cache, rope_tables
from fastvar.ops.qk_norm_rope import Rope

OP = "qk_norm_rope_into_cache"


def concatenated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_scale: torch.Tensor,
    rope: Rope | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in VAR and Infinity, with a cache in the keys' own dtype: `keys` and `values` (B, position, H, D) are copied
    into a longer tensor, a head's rows together."""
    q, k = eager(q, k, log_scale=log_scale, rope=rope)
    keys, values = (
        torch.cat((old.transpose(1, 2), new.transpose(1, 2)), 2).transpose(1, 2)
        for old, new in ((keys, k), (values, v))
    )
    return q, keys, values


def preallocated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position: int,
    *,
    log_scale: torch.Tensor,
    rope: Rope | None,
) -> torch.Tensor:
    """Eager PyTorch with the public operator's signature."""
    q, k = eager(q, k, log_scale=log_scale, rope=rope)
    key_cache[:, position : position + q.shape[1]] = k
    value_cache[:, position : position + q.shape[1]] = v
    return q


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    shape, batch, scale = MODELS[setting["model"]], setting["batch"], setting["scale"]
    schedule = shape.schedule
    start, end = schedule.starts[scale - 1], schedule.ends[scale - 1]
    q, k, v = torch.randn(batch, end - start, 3, shape.heads, shape.head_dim, device=device).to(dtype).unbind(2)
    # (B, capacity, H, D); in memory a head's rows lie together, as in `fastvar.models.kv_cache`
    caches = torch.full((2, batch, shape.heads, shape.tokens, shape.head_dim), float("nan"), dtype=dtype, device=device)
    caches[:, :, :, :start].normal_()
    caches = caches.transpose(2, 3)
    rope = None
    if setting["rope"]:
        cos, sin = rope_tables(schedule, shape.head_dim, device=device)
        rope = cos[start:end], sin[start:end]

    def with_cache(step: Callable[..., torch.Tensor], **options: Any) -> Contender:
        key_cache, value_cache = caches.clone()

        def contender(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Any, values: Any, **rest: Any
        ) -> tuple[torch.Tensor, ...]:
            q = step(q, k, v, key_cache, value_cache, start, **rest, **options)
            return q, key_cache[:, :end], value_cache[:, :end]

        return contender

    steps, backend = own(OP, q, qk_norm_rope_into_cache)
    steps |= {"eager": preallocated, "torch.compile": compiled(preallocated, setting)}
    contenders: dict[str, Contender] = {
        name: step if isinstance(step, str) else with_cache(step) for name, step in steps.items()
    }
    return Problem(
        {
            "q": q,
            "k": k,
            "v": v,
            "keys": caches[0, :, :start],
            "values": caches[1, :, :start],
            "log_scale": torch.linspace(0.0, 5.0, shape.heads, device=device),
            "rope": rope,
        },
        contenders | {"eager, torch.cat": concatenated},
        backend=backend,
        reference=concatenated,
        bytes=6 * q.numel() * q.element_size(),  # three in, three out; the tokens before stay where they are
    )


SUITE = Suite(
    OP,
    {
        "tiny": [{"model": "tiny", "rope": True, "scale": 3, "batch": 2, "dtype": "float32"}],
        "cpu": [
            {"model": "VAR-d16", "rope": False, "scale": 10, "batch": 8, "dtype": "float32"},
            {"model": "Infinity-2B-0.06M", "rope": True, "scale": 7, "batch": 2, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "rope": False, "scale": 2, "batch": 2, "dtype": "bfloat16"},
            {"model": "VAR-d30", "rope": False, "scale": 10, "batch": 128, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "rope": True, "scale": 13, "batch": 2, "dtype": "bfloat16"},
            {"model": "Infinity-2B", "rope": True, "scale": 13, "batch": 16, "dtype": "bfloat16"},
        ],
    },
    (*own_names(OP), "eager", "torch.compile", "eager, torch.cat"),
    build,
)
