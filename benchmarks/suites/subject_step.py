"""A training step of a group of samples of one subject: its prefix once, for every row, or in the sequence.

"fastvar, graphs" replays forward and backward passes. The rivals are the same model with the same operators: "prefix a
row" passes a prefix for every row, "concatenated" the sequence of reference and image, under a dense mask (SDPA).
Forward, cross-entropy without logits in memory, backward, clipping and AdamW, without dropout. The learning rate is 0,
so that every step is the same one; compared are its loss and the norm of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import OURS, Problem, Setting, Suite
from benchmarks.suites.training_step import GRAPHS, NO_GRAPHS, Step
from benchmarks.suites.vmr_grpo_step import make_policy
from fastvar.models import VAR
from fastvar.models.var_block import Block
from fastvar.ops import cross_entropy
from fastvar.training.loop import parameter_groups

Hidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from labels and inputs to what the head gets


class Concatenated:
    """Hidden states from sequences of reference and image, which have as many tokens each."""

    def __init__(self, var: VAR, subject: torch.Tensor) -> None:
        self.var, self.subject, tokens = var, subject, var.schedule.num_tokens
        scale = var.scale_index
        causal = scale[:, None] >= scale
        self.mask = torch.zeros(2 * tokens, 2 * tokens, dtype=torch.bool, device=scale.device)
        self.mask[:tokens, :tokens] = self.mask[tokens:, tokens:] = causal
        self.mask[tokens:, :tokens] = True

    def __call__(self, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        var, batch = self.var, len(inputs)
        condition = var.condition(labels)
        prefix = var._codes(self.subject) + var.positions(0, var.schedule.num_tokens) + var.subject_embed
        x = self._paired(prefix.expand(batch, -1, -1), var.embed(condition, inputs))
        ours = var.modulations(condition)
        theirs = var.modulations(var.subject_condition.expand(batch, 1, -1))
        for block, a, b in zip(var.blocks, theirs.blocks, ours.blocks, strict=True):
            x = block(x, self._paired(a, b), self.attend)
        return var.before_head(x.unflatten(0, (batch, 2))[:, 1], ours)

    @staticmethod
    def _paired(reference: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """(2 B, ...): each image after its reference, for everything but attention."""
        return torch.stack([reference, image], 1).flatten(0, 1)

    def attend(self, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = block.normalise(q, k)
        q, k, v = (t.reshape(-1, len(self.mask), *t.shape[2:]).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask, scale=block.softmax_scale)
        return out.transpose(1, 2).unflatten(1, (2, -1)).flatten(0, 1)


def build(setting: Setting, device: torch.device) -> Problem:
    with device:
        var = make_policy({**setting, "size": "tiny"}).to(device)  # its decoder is not needed
    group = setting["group_size"]
    tokens = torch.randint(var.config.vocab_size, (group + 1, var.schedule.num_tokens), device=device)
    subject = var.tokenizer.pyramid(tokens[:1])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting["dtype"] == "bfloat16")
    optimizer = torch.optim.AdamW(parameter_groups(var, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(hidden: Hidden, graphs: bool = False) -> Step:
        def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with autocast:
                states = hidden(labels, var.tokenizer.teacher_forcing(tokens))
                return cross_entropy(states, var.head.weight, var.head.bias, tokens).loss

        return Step(var, loss, optimizer, clip_norm=1.0, graphs=graphs)

    def plain(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        var.gradient_checkpointing = True  # in float32, where a large model's activations would not fit
        logits = var(labels, var.tokenizer.teacher_forcing(tokens), subject=subject.expand(group, -1, -1))
        var.gradient_checkpointing = False
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def prefilled(rows: int) -> Hidden:
        return lambda labels, inputs: var.hidden(labels, inputs, subject=subject.expand(rows, -1, -1))

    contenders: dict[str, Any] = {
        OURS: step(prefilled(1)),
        GRAPHS: step(prefilled(1), graphs=True) if device.type == "cuda" and var.config.depth <= 16 else NO_GRAPHS,
        "prefix a row": step(prefilled(group)),
        "concatenated": step(Concatenated(var, subject)),
    }
    expected = Step(var, plain, optimizer, clip_norm=1.0)
    var.eval()  # as in reinforcement learning; nothing is dropped
    return Problem(
        {"tokens": tokens[1:], "labels": torch.arange(group, device=device)},
        contenders,
        reference=expected,
        limit=1e-4 if setting["dtype"] == "float32" else 0.05,  # relative, of the loss and of the gradient's norm
    )


SUITE = Suite(
    "subject_step",
    {
        "tiny": [
            {"grids": "1,2,3,4", "depth": 2, "width": 64, "group_size": 3, "dtype": dtype}
            for dtype in ("float32", "bfloat16")
        ],
        "cpu": [{"grids": "var-256", "depth": 4, "width": 256, "group_size": 8, "dtype": "float32"}],
        "gpu": [{"model": model, "group_size": 8, "dtype": "bfloat16"} for model in ("VAR-d16", "VAR-d30")],
    },
    (OURS, GRAPHS, "prefix a row", "concatenated"),
    build,
    graphs=False,
)
