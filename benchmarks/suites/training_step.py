"""A whole training step of a VAR on given tokens: forward, loss, backward, clipping and AdamW.

Ours is what `fastvar.training` does with a `VARTask`, its figures for the log included, against FoundationVision/VAR's
model on the same random weights with the loss, clipping and optimizer of its trainer; both make the inputs of teacher
forcing from the tokens within the step. "bfloat16" is autocast over float32 weights, on both sides. The learning rate
is 0, so that every step is the same one; compared are its loss and the norm of its gradient. "fastvar, graphs" replays
forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled
from benchmarks.shapes import ModelShape
from benchmarks.suites.generate import CLASSES, build_models, shape_of
from fastvar.models import VAR
from fastvar.training.graphed import GraphedStep
from fastvar.training.loop import parameter_groups
from fastvar.training.var_task import VARTask

CHECKPOINTED, COMPILED, GRAPHS = "fastvar checkpointing", "fastvar compiled", "fastvar, graphs"
NO_GRAPHS = "no GPU, or a deep model: graphs would keep its activations and gradients while the others run"
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from tokens and labels


class Step:
    """A contender: from tokens and labels to the loss and the norm of its gradient, before clipping."""

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, clip_norm: float, graphs: bool = False
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip_norm = model.train(), loss, optimizer, clip_norm
        self.graphed = Graphed(self.part, model) if graphs else None

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphed is None:
            found = self.step(self.part, tokens, labels)
            self.optimizer.zero_grad(set_to_none=True)
            return found
        for _ in range(self.graphed.calls_before_a_replay()):
            self(tokens, labels)
        with self.graphed as part:
            return self.step(part, tokens, labels)

    def step(
        self, part: Callable[..., dict[str, torch.Tensor]], tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            loss = part(tokens=tokens, labels=labels)["loss"]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss, norm

    def part(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.loss(tokens, labels)
        loss.backward()
        return {"loss": loss.detach()}


class Graphed:
    """A `GraphedStep` beside contenders that share its model: inside, the parameters have the gradients that belong to
    it, zeroed; outside none."""

    def __init__(self, part: Callable[..., dict[str, torch.Tensor]], model: nn.Module) -> None:
        self.part, self.parameters = GraphedStep(part, model), list(model.parameters())
        self.gradients: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.fresh = True

    def calls_before_a_replay(self) -> int:
        """How many are to be made first, so that what is checked is a replay."""
        fresh, self.fresh = self.fresh, False
        return 2 if fresh else 0

    def __enter__(self) -> GraphedStep:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        there = [gradient for gradient in self.gradients if gradient is not None]
        if there:
            torch._foreach_zero_(there)
        return self.part

    def __exit__(self, *_: object) -> None:
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None


def our_loss(var: VAR, autocast: torch.autocast, called: Any = None, checkpointing: bool = False) -> Loss:
    """Of the task; `called` is the model as it is to be called, where that is not `var` itself."""
    task = VARTask(var)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        var.gradient_checkpointing = checkpointing
        with autocast:
            found = task.loss(var if called is None else called, {"tokens": tokens, "label": labels})[0]
        var.gradient_checkpointing = False
        return found

    return loss


def upstream_loss(upstream: Any, shape: ModelShape, autocast: torch.autocast) -> Loss:
    """Cross-entropy with each token's weight 1 / L, summed over an image; inputs are made outside autocast."""
    quantizer = upstream.vae_quant_proxy[0]
    weight = torch.full((1, shape.tokens), 1 / shape.tokens, device=upstream.lvl_1L.device)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = quantizer.idxBl_to_var_input(tokens.split(shape.schedule.lengths, 1))
        with autocast:
            logits = upstream(labels, inputs)
            each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
            return each.mul(weight).sum(-1).mean()

    return loss


def logits_loss(var: VAR) -> Loss:
    """Cross-entropy of our model's logits, where upstream's is not there to compare with."""

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = var(labels, var.tokenizer.teacher_forcing(tokens))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    return loss


def build(setting: Setting, device: torch.device) -> Problem:
    shape = shape_of(setting)
    var, upstream = build_models(shape, device)
    plain = torch.autocast(device.type, enabled=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting["dtype"] == "bfloat16")
    # as in fastvar.training.loop.train and TrainConfig, and as in FoundationVision/VAR's train.py
    our_optimizer = torch.optim.AdamW(parameter_groups(var, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)

    def ours(graphs: bool = False, **options: Any) -> Step:
        return Step(var, our_loss(var, autocast, **options), our_optimizer, clip_norm=1.0, graphs=graphs)

    contenders: dict[str, Contender] = {
        OURS: ours(),
        GRAPHS: ours(graphs=True) if device.type == "cuda" and shape.depth <= 16 else NO_GRAPHS,
        CHECKPOINTED: ours(checkpointing=True),
        COMPILED: "left out on CPUs and for deep models: compiling would take longer than all else",
        "upstream": "",  # holds its place
    }
    if device.type == "cuda" and shape.depth <= 16:
        model = compiled(var, setting)
        contenders[COMPILED] = model if isinstance(model, str) else ours(called=model)
    if isinstance(upstream, str):
        contenders["upstream"] = upstream
        expected = Step(var, logits_loss(var), our_optimizer, clip_norm=1.0)
    else:
        groups = parameter_groups(upstream, 0.05)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        contenders["upstream"] = Step(upstream, upstream_loss(upstream, shape, autocast), optimizer, clip_norm=2.0)
        expected = Step(upstream, upstream_loss(upstream, shape, plain), optimizer, clip_norm=2.0)

    tokens = torch.randint(shape.vocab_size, (setting["batch"], shape.tokens), device=device)
    labels = torch.arange(setting["batch"], device=device) * 37 % CLASSES
    flops, moved = work(shape, setting["batch"], var)
    return Problem(
        {"tokens": tokens, "labels": labels},
        contenders,
        reference=expected,
        limit=1e-4 if setting["dtype"] == "float32" else 0.05,  # relative, of the loss and of the gradient's norm
        flops=flops,
        bytes=moved,
    )


def work(shape: ModelShape, batch: int, var: VAR) -> tuple[float, float]:
    """Operations and bytes of a step, without what is small beside them."""
    schedule, width = shape.schedule, shape.width
    pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))
    matrices = 12 * shape.depth * width**2 + width * shape.vocab_size  # qkv, projection, MLP; head
    forward = 2.0 * batch * (shape.tokens * matrices + 2 * shape.depth * width * pairs)
    # AdamW reads weight, gradient and two moments and writes all but the gradient, which backward wrote; both passes
    # read the weights: ten times four bytes
    return 3 * forward, 40.0 * sum(p.numel() for p in var.parameters())


SUITE = Suite(
    "training_step",
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "dtype": "float32"},
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "bfloat16"},
        ],
        "cpu": [
            {"grids": grids, "depth": 4, "width": 256, "batch": batch, "dtype": "float32"}
            for grids, batch in (("var-256", 2), ("var-512", 1))
        ],
        "gpu": [
            {"model": "VAR-d16", "batch": 32, "dtype": "bfloat16"},
            {"model": "VAR-d30", "batch": 16, "dtype": "bfloat16"},
        ],
    },
    (OURS, GRAPHS, CHECKPOINTED, COMPILED, "upstream"),
    build,
    graphs=False,
)
