"""The suite of a group's training step: its rivals are the model, whatever its weights."""

from __future__ import annotations

import torch

from benchmarks.suites.subject_step import Concatenated
from benchmarks.suites.vmr_grpo_step import make_policy


def test_the_concatenated_sequence_is_the_model() -> None:
    torch.manual_seed(0)
    var = make_policy({"grids": "1,2,3", "depth": 2, "width": 64, "size": "tiny"}).double().eval()
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(var.config.vocab_size, (4, var.schedule.num_tokens))
    subject = var.tokenizer.pyramid(tokens[:1]).double()
    labels, inputs = torch.arange(3), var.tokenizer.teacher_forcing(tokens[1:]).double()
    expected = var.hidden(labels, inputs, subject=subject)
    found = Concatenated(var, subject)(labels, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    other = var.hidden(labels, inputs, subject=var.tokenizer.pyramid(tokens[1:2]).double())
    assert (other - expected).abs().max() > 1e-3  # the subject counts
