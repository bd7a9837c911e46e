"""The VAR in training mode: dropped conditions, dropped subjects, dropped paths, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvar.models import VAR
from tests.helpers.tiny import some_subjects, some_tokens, tiny_var, unconditional

QUIET: dict[str, Any] = {"condition_dropout": 0.0, "subject_dropout": 0.0, "drop_path": 0.0}
ROWS = 400


def same_input(var: VAR, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` times the same label and image."""
    inputs = var.tokenizer.teacher_forcing(some_tokens(var, 1)).expand(count, -1, -1)
    return torch.full((count,), 2), inputs


def rows_like(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """(B,) bool: whose logits are those of `row`."""
    return (logits - row).abs().amax((1, 2)) < 1e-4


def test_nothing_is_dropped_at_rate_zero() -> None:
    var = tiny_var(subject="block_causal", **QUIET)
    labels, inputs = same_input(var, 3)
    subject = some_subjects(var, 1)
    expected = var(labels, inputs, subject=subject)
    assert torch.equal(var.train()(labels, inputs, subject=subject), expected)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_condition_dropout(rate: float) -> None:
    var = tiny_var(**{**QUIET, "condition_dropout": rate})
    labels, inputs = same_input(var, ROWS)
    kept, dropped = (model(labels[:1], inputs[:1]) for model in (var, unconditional(var)))
    torch.manual_seed(0)
    logits = var.train()(labels, inputs)
    assert (rows_like(logits, kept) ^ rows_like(logits, dropped)).all()
    assert rows_like(logits, dropped).float().mean() == pytest.approx(rate, abs=0.08)
    assert (rate < 1) == bool(rows_like(logits, kept).any())


@pytest.mark.parametrize("kind", ["block_causal", "bidirectional"])
def test_subject_dropout(kind: str) -> None:
    """A group loses its subject as a whole, and then is what it would be without one; half of its samples lose the
    condition too, independently, as guidance contrasts with that."""
    var = tiny_var(subject=kind, **{**QUIET, "subject_dropout": 0.3})
    labels, inputs = same_input(var, ROWS)
    subject = some_subjects(var, 1)
    kept = var(labels[:1], inputs[:1], subject=subject)
    dropped = var(labels[:1], inputs[:1])
    both = unconditional(var)(labels[:1], inputs[:1])
    torch.manual_seed(0)
    logits = var.train()(labels, inputs, subject=subject.expand(ROWS // 2, -1, -1))
    subject_alone, all_lost = rows_like(logits, dropped), rows_like(logits, both)
    lost = subject_alone | all_lost
    assert (lost ^ rows_like(logits, kept)).all() and not (subject_alone & all_lost).any()
    assert torch.equal(lost[::2], lost[1::2])
    assert not torch.equal(all_lost[::2], all_lost[1::2])
    assert lost.float().mean() == pytest.approx(0.3, abs=0.1)
    assert all_lost.float().mean() == pytest.approx(0.15, abs=0.07)


def test_drop_path() -> None:
    """The last of two blocks drops its attention and its MLP, each for itself, in half of the samples."""
    var = tiny_var(**{**QUIET, "drop_path": 0.5})
    labels, inputs = same_input(var, ROWS)
    expected = var(labels[:1], inputs[:1])
    torch.testing.assert_close(var(labels, inputs), expected.expand(ROWS, -1, -1))
    torch.manual_seed(0)
    logits = var.train()(labels, inputs)
    _, counts = logits.sum((1, 2)).mul(100).round().unique(return_counts=True)
    assert len(counts) == 4
    assert (counts / ROWS).tolist() == pytest.approx([0.25] * 4, abs=0.08)
    assert [block.drop_path for block in var.blocks] == [0.0, 0.5]


def test_a_dropped_path_keeps_its_mean() -> None:
    block = tiny_var(drop_path=0.3).blocks[1].train()
    torch.manual_seed(0)
    out = block._dropped(torch.ones(10_000, 1, 1))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert out.mean().item() == pytest.approx(1, abs=0.03)


def test_gradient_checkpointing() -> None:
    """The same gradients to the bit, with all that is random, for less memory."""
    var = tiny_var(subject="block_causal", drop_path=0.4, condition_dropout=0.3, subject_dropout=0.3, depth=3).train()
    labels = torch.arange(6) % 5
    tokens, subject = some_tokens(var, 6), some_subjects(var, 2)
    inputs = var.tokenizer.teacher_forcing(tokens)

    def run() -> tuple[dict[str, torch.Tensor], int]:
        saved: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        torch.manual_seed(5)
        var.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = -var(labels, inputs, subject=subject, tokens=tokens).log_probs.mean()
        kept = sum(saved)
        loss.backward()
        return {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}, kept

    expected, whole = run()
    var.gradient_checkpointing = True
    got, kept = run()
    assert kept < whole / 2
    assert set(got) == set(expected) == {name for name, _ in var.named_parameters()}
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_few_steps_learn_a_batch() -> None:
    var = tiny_var(**QUIET).train()
    labels, tokens = torch.arange(4), some_tokens(var, 4)
    inputs = var.tokenizer.teacher_forcing(tokens)
    optimizer = torch.optim.AdamW(var.parameters(), 1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -var(labels, inputs, tokens=tokens).log_probs.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.2
