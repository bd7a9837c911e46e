"""Drawing Infinity's bits with guidance, temperature and top-p, against its sampler over pairs of logits.

Infinity's head gives two logits for each bit, of 0 and of 1, and its sampler treats them as a vocabulary of two. Our
operator takes their differences, half as many numbers, which a head of differences gives at once. So do the rivals
"closed form": they decide and draw like ours, from PyTorch's generator. Settings of Infinity-2B: guidance 3 (which it
calls 4), temperature 0.5, top-p 0.97. "log_probs" asks for two log-probabilities of each token as well, the model's and
the sampler's. Nobody shares a random generator: see `error`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import checkout, compiled, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import sample_bits

OP = "sample_bits"
GUIDANCE, TEMPERATURE, TOP_K, TOP_P = 3.0, 0.5, 900, 0.97
CERTAIN = math.log(TOP_P / (1 - TOP_P))  # top-p leaves no choice where the logits differ by this
EDGE = 1e-4  # of a difference: so close to CERTAIN rounding decides
SIGMAS = 6.0  # that a mean of draws may be off
UPSTREAM_SAMPLER = "sample_with_top_k_top_p_also_inplace_modifying_logits_"
Drawn = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # bits and a token's two log-probabilities


class Expected(NamedTuple):
    """Differences (B, n, d) that draws are judged by: the model's own and the sampler's."""

    own: torch.Tensor
    guided: torch.Tensor


def upstream_sampler(path: Path) -> Callable[..., torch.Tensor]:
    """That function alone: its module imports a training framework and flash-attn."""
    file = path / "infinity/models/infinity.py"
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    module = ast.Module([node for node in functions if node.name == UPSTREAM_SAMPLER], [])
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(module, str(file), "exec"), namespace)
    return namespace[UPSTREAM_SAMPLER]


def draw_pairs(pairs: torch.Tensor, **_: Any) -> torch.Tensor:
    """What Infinity's sampler does: sorts each pair, drops what top-p drops, in place, and draws; top-k keeps both."""
    rising, order = pairs.sort(-1)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - TOP_P
    dropped[..., -1] = False
    pairs.masked_fill_(dropped.scatter(-1, order, dropped), -torch.inf)
    return torch.multinomial(pairs.softmax(-1).view(-1, 2), 1).view(*pairs.shape[:-1], 1)


def over_pairs(sample: Callable[..., torch.Tensor], log_probs: bool) -> Callable[..., Drawn]:
    """Infinity's formulas before a sampler over pairs (B, n d, 2); afterwards log_softmax and gather."""

    def call(pairs: torch.Tensor, **_: Any) -> Drawn:
        batch, count, bits = len(pairs) // 2, pairs.shape[1], pairs.shape[2] // 2
        conditional, unconditional = pairs.mul(1 / TEMPERATURE).split(batch)
        mixed = ((1 + GUIDANCE) * conditional - GUIDANCE * unconditional).view(batch, -1, 2)
        drawn = sample(mixed, top_k=TOP_K, top_p=TOP_P)

        def scores(logits: torch.Tensor) -> torch.Tensor:
            return logits.log_softmax(-1).gather(-1, drawn).view(batch, count, bits).sum(-1)

        found = drawn.view(batch, count, bits)
        return (found, scores(conditional.view(batch, -1, 2)), scores(mixed)) if log_probs else (found, None, None)

    return call


def closed_form(log_probs: bool) -> Callable[..., Drawn]:
    def call(logits: torch.Tensor, unconditional: torch.Tensor, **_: Any) -> Drawn:
        mixed = ((1 + GUIDANCE) * logits - GUIDANCE * unconditional) / TEMPERATURE
        certain = mixed.abs() >= CERTAIN
        drawn = torch.where(certain, mixed > 0, torch.rand_like(mixed) < mixed.sigmoid())
        if not log_probs:
            return drawn, None, None
        sign = drawn.to(mixed.dtype) * 2 - 1
        own_scores = F.logsigmoid(sign * logits / TEMPERATURE).sum(-1)
        return drawn, own_scores, F.logsigmoid(sign * mixed).masked_fill(certain, 0).sum(-1)

    return call


def reference(logits: torch.Tensor, unconditional: torch.Tensor, **_: Any) -> Expected:
    return Expected(logits / TEMPERATURE, ((1 + GUIDANCE) * logits - GUIDANCE * unconditional) / TEMPERATURE)


def error(found: Drawn, expected: Expected) -> float:
    """The largest error of a token's log-probability, of those that do not hang on rounding; infinite where a bit that
    is certain is wrong, or where the draws as a whole are more or less likely than chance allows."""
    bits, own_found, sampled_found = found
    bits = bits.bool()
    size = expected.guided.abs()
    certain, edge = size >= CERTAIN, (size - CERTAIN).abs() < EDGE
    ones = torch.where(certain, (expected.guided > 0).to(size.dtype), expected.guided.sigmoid())
    # a bit's log-probability is off its mean by (bit - p) z
    off = ((bits.to(size.dtype) - ones) * expected.guided).sum().abs()
    off = off / (ones * (1 - ones) * expected.guided.square()).sum().sqrt()
    wrong = (bits != (expected.guided > 0)) & certain & ~edge
    if bool(wrong.any()) or not float(off) <= SIGMAS:
        return float("inf")
    if own_found is None or sampled_found is None:
        return 0.0
    sign = bits.to(size.dtype) * 2 - 1
    scores = F.logsigmoid(sign * expected.guided)
    at_edge = scores.masked_fill(~edge, 0).sum(-1).abs()
    of_own = (own_found - F.logsigmoid(sign * expected.own).sum(-1)).abs()
    of_sampled = (sampled_found - scores.masked_fill(certain, 0).sum(-1)).abs() - at_edge
    return float(torch.stack([of_own, of_sampled]).amax().clamp_min(0).nan_to_num(nan=float("inf")))


def build(setting: Setting, device: torch.device) -> Problem:
    dtype, batch, count = getattr(torch, setting["dtype"]), setting["batch"], setting["tokens"]
    bits, log_probs = MODELS[setting["model"]].channels, bool(setting["log_probs"])
    pairs = 0.2 * torch.randn(2 * batch, count, bits, 2, device=device).to(dtype)  # so that a fifth is certain
    both = pairs[..., 1] - pairs[..., 0]

    def ours(pairs: torch.Tensor, **arguments: Any) -> Drawn:
        return sample_bits(**arguments, guidance=GUIDANCE, temperature=TEMPERATURE, top_p=TOP_P, log_probs=log_probs)

    contenders, backend = own(OP, both, ours)
    path = checkout("Infinity")
    there = isinstance(path, Path)
    contenders["upstream"] = over_pairs(upstream_sampler(path), log_probs) if isinstance(path, Path) else path
    eager, closed = over_pairs(draw_pairs, log_probs), closed_form(log_probs)
    alike: Contender = "upstream does the same" if there else eager
    contenders |= {"eager, pairs": alike, "torch.compile, pairs": compiled(eager, setting)}
    contenders |= {"eager, closed form": closed, "torch.compile, closed form": compiled(closed, setting)}
    return Problem(
        {
            "logits": both[:batch],
            "unconditional": both[batch:],
            "seeds": torch.arange(batch, device=device),
            "pairs": pairs.flatten(2),
        },
        contenders,
        backend=backend,
        reference=reference,
        check=error,
        limit=1e-3,  # of a sum of up to 56 logarithms in float32
        # differences are read once; a bit is 1 byte, a token's log-probability 4
        bytes=both.numel() * both.element_size() + batch * count * (bits + (8 if log_probs else 0)),
    )


def _setting(model: str, batch: int, tokens: int, log_probs: bool) -> Setting:
    return {"model": model, "batch": batch, "tokens": tokens, "log_probs": log_probs, "dtype": "float32"}


SUITE = Suite(
    OP,
    {
        "tiny": [_setting("tiny", 2, 16, True), _setting("tiny", 2, 16, False)],
        "cpu": [_setting("Infinity-2B", 1, 4096, True)],
        # the last scale at a million pixels and an early one
        "gpu": [
            _setting("Infinity-2B", 4, 4096, False),
            _setting("Infinity-2B", 4, 16, False),
            _setting("Infinity-8B", 4, 4096, True),
        ],
    },
    (
        *own_names(OP),
        "upstream",
        "eager, pairs",
        "torch.compile, pairs",
        "eager, closed form",
        "torch.compile, closed form",
    ),
    build,
)
