"""The VAR in bfloat16: as weights and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvar.models import VAR
from tests.helpers.tiny import some_subjects, some_tokens, tiny_var

LABELS = torch.tensor([0, 3, 4, 1])
# Of log-probabilities of -5 and above, after two layers with eight bits of mantissa. A wrong token or position gives 1.
SAMPLED = 0.02  # sampling against teacher forcing in the same dtype; up to 0.008 is seen
ROUNDED = 0.05  # against float32; up to 0.017 is seen


def scored(var: VAR, tokens: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    return var(LABELS, var.tokenizer.teacher_forcing(tokens), subject=subject, tokens=tokens).log_probs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_weights(dtype: torch.dtype, guidance: float) -> None:
    """Sampling, its log-probabilities, teacher forcing and gradients; log-probabilities stay in float32."""
    var = tiny_var(subject="block_causal")
    subject = some_subjects(var, 2)
    exact = tiny_var(subject="block_causal")
    var.to(dtype)
    out = var.generate(LABELS, subject=subject, guidance=guidance, log_probs=True, top_p=0.9)
    assert out.log_probs.dtype == out.images.dtype == torch.float32
    part = var.generate(LABELS, guidance=guidance, stop=1)
    assert part.state.cache.keys.dtype == dtype and torch.isfinite(out.images).all()
    found = scored(var, out.tokens, subject)
    assert found.dtype == torch.float32
    torch.testing.assert_close(out.log_probs, found, rtol=0, atol=SAMPLED)
    torch.testing.assert_close(found, scored(exact, out.tokens, subject), rtol=0, atol=ROUNDED)
    assert var(LABELS, var.tokenizer.teacher_forcing(out.tokens)).dtype == torch.float32
    (-found.mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in var.parameters())


@pytest.mark.parametrize("fields", [{}, {"qk_l2_norm": False, "shared_adaln": True}], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_autocast(fields: dict[str, Any], guidance: float) -> None:
    """What is sampled under autocast is scored alike under autocast; VAR's own sampler and trainer disagree here."""
    var = tiny_var(subject="bidirectional", **fields)
    subject = some_subjects(var, 2)
    with torch.autocast("cpu", torch.bfloat16):
        part = var.generate(LABELS, subject=subject, guidance=guidance, log_probs=True, stop=2)
        out = var.generate(state=part.state.fork(1), guidance=guidance, log_probs=True)
        found = scored(var, out.tokens, subject)
    assert part.state.cache.keys.dtype == torch.bfloat16
    torch.testing.assert_close(out.log_probs, found, rtol=0, atol=SAMPLED)
    torch.testing.assert_close(found, scored(var, out.tokens, subject), rtol=0, atol=ROUNDED)
    assert not torch.equal(found, scored(var, out.tokens, subject))


def test_autocast_gradients() -> None:
    var = tiny_var(condition_dropout=0.0).train()
    tokens = some_tokens(var, 4)
    inputs = var.tokenizer.teacher_forcing(tokens)

    def gradients(autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = -var(LABELS, inputs, tokens=tokens).log_probs.mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(var.parameters()))])

    got, expected = gradients(True), gradients(False)
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(got, expected, 0) > 0.999


def test_a_tokenizer_in_bfloat16() -> None:
    tokenizer = tiny_var().tokenizer
    images = torch.rand(2, 3, 6, 6) * 2 - 1
    expected = tokenizer.decode(tokenizer.encode(images))
    tokenizer.to(torch.bfloat16)
    assert (tokenizer.decode(tokenizer.encode(images)).float() - expected).abs().mean() < 0.2
