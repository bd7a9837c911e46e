"""Drawing tokens with guidance, top-k and top-p, against what VAR does, a shorter eager form and torch.compile.

Two settings of VAR's evaluation stand for all: guidance 1.5, top-k 900, top-p 0.96. "log_probs" asks for two
log-probabilities of each token as well, the model's and the sampler's, as reinforcement learning does; the rivals
gather them from log_softmax. Nobody shares a random generator, so that tokens are judged by the distribution that they
are drawn from: see `error`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import checkout, compiled, own, own_names
from fastvar.ops import sample_tokens

OP = "sample_tokens"
GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
EDGE = 1e-4  # of the mass: where top-p cuts so close to a token, rounding decides whether it is kept
SIGMAS = 6.0  # that a mean of draws may be off
Drawn = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # tokens and their two log-probabilities


class Expected(NamedTuple):
    """What draws are judged by.

    Attributes:
        own: (B, n, V) log-probabilities of the model, without guidance and truncation.
        sampled: (B, n, V) of the sampler, keeping a little more than top-k and top-p ask for; minus infinity for what
            it drops.
        narrow: (B, n), log of the share of that which is kept by keeping a little less.
    """

    own: torch.Tensor
    sampled: torch.Tensor
    narrow: torch.Tensor


def guided(logits: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
    return (1 + GUIDANCE) * logits - GUIDANCE * unconditional


def at(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, tokens[..., None])[..., 0]


def truncated(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The logits, with minus infinity for all that top-k and then top-p drop."""
    return shared_out(logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf), top_p)


def shared_out(kept: torch.Tensor, top_p: float, margin: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Top-p alone; logits within `margin` below the smallest that it keeps are kept with it."""
    rising = kept.sort(-1).values
    dropped = (rising.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True).clamp_max(kept.shape[-1] - 1)
    return kept.masked_fill(kept < rising.gather(-1, dropped) - margin, -torch.inf)


def eager_sort(logits: torch.Tensor, unconditional: torch.Tensor, *, top_k: int, log_probs: bool, **_: Any) -> Drawn:
    """As VAR does it: all logits are sorted."""
    logits = logits.float()
    kept = truncated(guided(logits, unconditional.float()), top_k, TOP_P)
    tokens = torch.multinomial(kept.softmax(-1).flatten(0, 1), 1).view(kept.shape[:2])
    return _scored(logits, kept, tokens, log_probs)


def eager_topk(logits: torch.Tensor, unconditional: torch.Tensor, *, top_k: int, log_probs: bool, **_: Any) -> Drawn:
    """Only the k largest logits are sorted, and drawn from without torch.multinomial, which may wait for the GPU."""
    logits = logits.float()
    falling, places = guided(logits, unconditional.float()).topk(top_k)
    probs = falling.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= TOP_P, 0)  # the mass before it is enough
    drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    tokens = at(places, drawn)
    if not log_probs:
        return tokens, None, None
    return tokens, at(logits.log_softmax(-1), tokens), (at(probs, drawn) / probs.sum(-1)).log()


def upstream(path: Path, top_k: int, log_probs: bool) -> Callable[..., Drawn]:
    """VAR's formula for guidance, then its `sample_with_top_k_top_p_`, then log_softmax and gather."""
    spec = importlib.util.spec_from_file_location("var_helpers", path / "models/helpers.py")
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)

    def call(logits: torch.Tensor, unconditional: torch.Tensor, **_: Any) -> Drawn:
        logits = logits.float()
        kept = guided(logits, unconditional.float())
        # writes minus infinity to what it drops
        tokens = helpers.sample_with_top_k_top_p_(kept, top_k=top_k, top_p=TOP_P)[..., 0]
        return _scored(logits, kept, tokens, log_probs)

    return call


def _scored(logits: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor, log_probs: bool) -> Drawn:
    if not log_probs:
        return tokens, None, None
    return tokens, at(logits.log_softmax(-1), tokens), at(kept.log_softmax(-1), tokens)


def reference(logits: torch.Tensor, unconditional: torch.Tensor, *, top_k: int, **_: Any) -> Expected:
    """Where two logits at the k-th place are within roundings of float32, top-k may keep one more or less; of 16,384
    tokens that one weighs more than EDGE, so that top-p may then cut at another token too. And two logits that are
    equal in float32 where top-p cuts are kept together, of which float64 may drop one."""
    mixed = guided(logits, unconditional)
    size = ((1 + GUIDANCE) * logits.abs() + GUIDANCE * unconditional.abs()).amax(-1, keepdim=True)
    rounding = size * 2.0**-22  # two guided logits, each off by two roundings of its parts
    last, next_ = mixed.topk(top_k + 1).values[..., -2:].split(1, -1)
    most = mixed.masked_fill(mixed < last - rounding, -torch.inf)
    least = mixed.masked_fill(mixed <= next_ + rounding, -torch.inf)
    sampled = shared_out(most, TOP_P + EDGE, rounding).log_softmax(-1)
    dropped = shared_out(least, TOP_P - EDGE) == -torch.inf
    return Expected(logits.log_softmax(-1), sampled, sampled.masked_fill(dropped, -torch.inf).logsumexp(-1))


def error(found: Drawn, expected: Expected) -> float:
    """The largest error of a log-probability; infinite where a token that must be dropped was drawn, or where the draws
    as a whole are more or less likely than chance allows."""
    tokens, own_found, sampled_found = found
    sampled = at(expected.sampled, tokens)
    probs = expected.sampled.exp()
    finite = expected.sampled.masked_fill(probs == 0, 0)
    mean = (probs * finite).sum(-1)
    variance = (probs * finite.square()).sum(-1) - mean.square()
    off = (sampled - mean).sum().abs() / variance.sum().sqrt()
    if not (bool(sampled.isfinite().all()) and float(off) <= SIGMAS):
        return float("inf")
    if own_found is None or sampled_found is None:
        return 0.0
    errors = torch.stack(
        [
            (own_found - at(expected.own, tokens)).abs(),
            sampled - sampled_found,
            sampled_found - (sampled - expected.narrow),
        ]
    )
    return float(errors.amax().clamp_min(0).nan_to_num(nan=float("inf")))


def build(setting: Setting, device: torch.device) -> Problem:
    dtype = getattr(torch, setting["dtype"])
    batch, size, log_probs = setting["batch"], setting["vocabulary"], bool(setting["log_probs"])
    # both halves of one tensor, as the network returns them
    both = torch.randn(2 * batch, setting["tokens"], size, device=device).to(dtype)
    top_k = min(TOP_K, size // 4)
    options: dict[str, Any] = {"top_k": top_k, "log_probs": log_probs}

    def ours(**arguments: Any) -> Drawn:
        return sample_tokens(**arguments, guidance=GUIDANCE, top_p=TOP_P, **options)

    def topk(**arguments: torch.Tensor) -> Drawn:
        return eager_topk(**arguments, **options)

    contenders, backend = own(OP, both, ours)
    path = checkout("VAR")
    there = isinstance(path, Path)
    contenders["upstream"] = upstream(path, **options) if isinstance(path, Path) else path
    sort: Contender = "upstream does the same" if there else partial(eager_sort, **options)
    contenders |= {"eager, sort": sort, "eager, topk": topk, "torch.compile": compiled(topk, setting)}
    results = batch * setting["tokens"]
    return Problem(
        {
            "logits": both[:batch],
            "unconditional": both[batch:],
            "seeds": torch.arange(batch, device=device),
        },
        contenders,
        backend=backend,
        reference=partial(reference, top_k=top_k),
        check=error,
        limit=1e-4,  # of a logarithm in float32, up to about 30
        # a row of logits fits on a chip, so that each is read once; a token is 8 bytes, a log-probability 4
        bytes=both.numel() * both.element_size() + results * (16 if log_probs else 8),
    )


def _setting(batch: int, tokens: int, vocabulary: int, log_probs: bool, dtype: str) -> Setting:
    return {"batch": batch, "tokens": tokens, "vocabulary": vocabulary, "log_probs": log_probs, "dtype": dtype}


SUITE = Suite(
    OP,
    {
        "tiny": [_setting(2, 12, 64, True, "float32"), _setting(2, 12, 64, False, "bfloat16")],
        "cpu": [_setting(2, 256, 4096, True, "float32")],
        # the last and the first scale of VAR at 256 pixels, a larger vocabulary, and a model in bfloat16 that generates
        "gpu": [
            _setting(64, 256, 4096, True, "float32"),
            _setting(64, 1, 4096, True, "float32"),
            _setting(64, 256, 16384, True, "float32"),
            _setting(64, 256, 4096, False, "bfloat16"),
        ],
    },
    (*own_names(OP), "upstream", "eager, sort", "eager, topk", "torch.compile"),
    build,
)
