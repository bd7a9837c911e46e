"""What the suite of sample_tokens takes for right where logits are equal in float32 and not in float64."""

from __future__ import annotations

import torch

from benchmarks.suites import sample_tokens as suite

SIZE, TOP_K = 64, 16


def drawn(mixed: torch.Tensor, kept: int) -> suite.Drawn:
    """The largest logit, with its log-probability where `kept` logits are left to top-p."""
    tokens = mixed.argmax(-1)
    scores = suite.truncated(mixed, kept, suite.TOP_P).log_softmax(-1)
    return tokens, suite.at(mixed.log_softmax(-1), tokens), suite.at(scores, tokens)


def test_a_tie_at_the_kth_place() -> None:
    """One more or one less is right, two more are not; and without a tie nothing is but the k largest."""
    changes = 0
    for seed in range(40):
        values = torch.rand(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
        mixed = values.flip(0)[None, None]
        zero = torch.zeros_like(mixed)
        logits = mixed / (1 + suite.GUIDANCE)
        alone = suite.reference(logits, zero, top_k=TOP_K)
        tied = logits.clone()
        tied[..., TOP_K] = tied[..., TOP_K - 1] * (1 - 1e-9)
        expected = suite.reference(tied, zero, top_k=TOP_K)

        def off(kept: int, given: torch.Tensor, wanted: suite.Expected) -> float:
            tokens, _, sampled = drawn(suite.guided(given, torch.zeros_like(given)), kept)
            assert sampled is not None
            at = suite.at(wanted.sampled, tokens)
            return float(torch.maximum(at - sampled, sampled - at + wanted.narrow).amax())

        assert off(TOP_K, tied, expected) < 1e-6 and off(TOP_K + 1, tied, expected) < 1e-6
        assert off(TOP_K, logits, alone) < 1e-6
        changes += off(TOP_K + 1, logits, alone) > 1e-3 and off(TOP_K + 2, tied, expected) > 1e-3
    assert changes > 20


def test_a_tie_where_top_p_cuts() -> None:
    """Of two logits that are equal in float32, float64 drops the smaller one. Keeping both is right, but not where they
    differ."""
    changes = 0
    for seed in range(40):
        values = torch.rand(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
        logits = 3 * values.flip(0)[None, None]
        kept = keeps(logits)
        tied = logits.clone()
        tied[..., kept] = tied[..., kept - 1] * (1 - 1e-9)
        if kept < TOP_K and keeps(tied) == kept:
            assert error_of_keeping(tied, kept + 1) < 1e-6
            changes += error_of_keeping(logits, kept + 1) > 1e-3
    assert changes > 10


def keeps(logits: torch.Tensor) -> int:
    """How many logits top-k and top-p leave."""
    kept = suite.truncated(suite.guided(logits, torch.zeros_like(logits)), TOP_K, suite.TOP_P)
    return int((kept > -torch.inf).sum())


def error_of_keeping(logits: torch.Tensor, count: int) -> float:
    """The suite's error where the `count` largest of falling logits are kept and the first is drawn."""
    zero = torch.zeros_like(logits)
    sampled = suite.guided(logits, zero)[..., :count].log_softmax(-1)
    found = (torch.zeros(1, 1, dtype=torch.int64), logits.log_softmax(-1)[..., 0], sampled[..., 0])
    return suite.error(found, suite.reference(logits, zero, top_k=TOP_K))
