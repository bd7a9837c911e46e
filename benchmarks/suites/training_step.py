"""A whole training step of a VAR or an Infinity on given tokens: forward, loss, backward, clipping and AdamW.

Ours is what `fastvar.training` does with a `VARTask`, its figures for the log included, against FoundationVision/VAR's
model on the same random weights with the loss, clipping and optimizer of its trainer; both make the inputs of teacher
forcing from the tokens within the step. An Infinity's bits, its inputs of self-correction and its texts are given, and
its loss weighs all tokens alike, on both sides. "bfloat16" is autocast over float32 weights, on both sides. The
learning rate is 0, so that every step is the same one; compared are its loss and the norm of its gradient. "fastvar,
graphs" replays forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import OURS, Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled
from benchmarks.shapes import ModelShape
from benchmarks.suites.generate import CLASSES, build_models, shape_of, weights_of_a_token
from benchmarks.upstream_infinity import build_infinity, public_loss, texts_of
from fastvar.models import VAR, Infinity, TextFeatures, bitwise_loss, self_correction
from fastvar.ops import bitwise_residual_quantize
from fastvar.training.graphed import GraphedStep
from fastvar.training.loop import parameter_groups
from fastvar.training.var_task import VARTask

CHECKPOINTED, COMPILED, GRAPHS = "fastvar checkpointing", "fastvar compiled", "fastvar, graphs"
UPSTREAM_CHECKPOINTED = "upstream checkpointing"
NO_GRAPHS = "no GPU, or a deep model: graphs would keep its activations and gradients while the others run"
Loss = Callable[..., torch.Tensor]  # from tokens and labels, or from packed texts, inputs and bits


class Step:
    """A contender: from a batch of tensors to the loss and the norm of its gradient, before clipping.

    Args:
        model: what is trained.
        loss: from the tensors, and before them the options, to the loss.
        optimizer, clip_norm: of the step.
        graphs: whether forward and backward passes are replayed.
        options: what the loss needs of the host.
        twice: parameters whose gradients count twice where ours has them once, as those of a head of two logits a bit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        graphs: bool = False,
        options: Sequence[Hashable] = (),
        twice: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip_norm = model.train(), loss, optimizer, clip_norm
        self.graphed = Graphed(self.part, model) if graphs else None
        self.options, self.twice = options, twice

    def __call__(self, **batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphed is None:
            found = self.step(self.part, batch)
            self.optimizer.zero_grad(set_to_none=True)
            return found
        for _ in range(self.graphed.calls_before_a_replay()):
            self(**batch)
        with self.graphed as part:
            return self.step(part, batch)

    def step(
        self, part: Callable[..., dict[str, torch.Tensor]], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            loss = part(*self.options, **batch)["loss"]
        counted_twice = sum(parameter.grad.square().sum() / 2 for parameter in self.twice)  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss, (norm.square() - counted_twice).sqrt() if self.twice else norm

    def part(self, *options: Hashable, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.loss(*options, **batch)
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
    """One step of the task; `called` is the model as it is to be called, where that is not `var` itself."""
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


def our_infinity_loss(net: Infinity, autocast: torch.autocast, called: Any = None, checkpointing: bool = False) -> Loss:
    """That of `InfinityTask` without weights of scales."""

    def loss(lengths: tuple[int, ...], packed: torch.Tensor, inputs: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        net.gradient_checkpointing = checkpointing
        with autocast:
            logits = (net if called is None else called)(TextFeatures(packed, lengths), inputs)
            found = bitwise_loss(logits, bits)
        net.gradient_checkpointing = False
        return found

    return loss


def upstream_infinity_loss(
    upstream: Any, shape: ModelShape, autocast: torch.autocast, checkpointing: bool = False
) -> Loss:
    def loss(lengths: tuple[int, ...], packed: torch.Tensor, inputs: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        upstream.checkpointing = "full-block" if checkpointing else None
        with autocast:
            return public_loss(upstream, TextFeatures(packed, lengths), inputs, bits, shape.schedule)

    return loss


def build(setting: Setting, device: torch.device) -> Problem:
    """Ours has the settings of `fastvar.training.loop.train` and `TrainConfig`, upstream those of its own trainers."""
    shape = shape_of(setting)
    plain = torch.autocast(device.type, enabled=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting["dtype"] == "bfloat16")
    model: Any
    if shape.vocab_size:
        model, upstream = build_models(shape, device)
        loss, their_loss, clip_norm = our_loss, upstream_loss, 2.0
        options: dict[str, Any] = {}
        batch = tokens_and_labels(shape, setting["batch"], device)
        twice: dict[str, Any] = {}
    else:
        model, upstream = build_infinity(shape, device, training=True)
        loss, their_loss, clip_norm = our_infinity_loss, upstream_infinity_loss, 5.0
        texts = texts_of(setting.get("texts"), setting["batch"], device)
        options = {"options": (texts.lengths,)}
        batch = {"packed": texts.packed, **bits_and_inputs(model, setting["batch"], device)}
        twice = {} if isinstance(upstream, str) else {"twice": list(upstream.head.parameters())}
    betas = (0.9, 0.95) if shape.vocab_size else (0.9, 0.97)

    def adamw(trained: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(trained, 0.05), lr=0.0, betas=betas, fused=True)

    our_optimizer = adamw(model)

    def ours(graphs: bool = False, **how: Any) -> Step:
        return Step(model, loss(model, autocast, **how), our_optimizer, clip_norm=1.0, graphs=graphs, **options)

    contenders: dict[str, Contender] = {
        OURS: ours(),
        GRAPHS: ours(graphs=True) if device.type == "cuda" and shape.depth <= 16 else NO_GRAPHS,
        CHECKPOINTED: ours(checkpointing=True),
        COMPILED: "left out on CPUs and for deep models: compiling would take longer than all else",
        "upstream": "",  # holds its place
        UPSTREAM_CHECKPOINTED: "upstream's VAR has none",
    }
    if device.type == "cuda" and shape.depth <= 16:
        called = compiled(model, setting)
        contenders[COMPILED] = called if isinstance(called, str) else ours(called=called)
    if isinstance(upstream, str):
        contenders |= dict.fromkeys(("upstream", UPSTREAM_CHECKPOINTED), upstream)
        expected = Step(
            model, logits_loss(model) if shape.vocab_size else loss(model, plain), our_optimizer, 1.0, **options
        )
    else:
        optimizer = adamw(upstream)

        def theirs(precision: torch.autocast, **how: Any) -> Step:
            return Step(
                upstream, their_loss(upstream, shape, precision, **how), optimizer, clip_norm, **options, **twice
            )

        contenders["upstream"] = theirs(autocast)
        expected = theirs(plain)
        if not shape.vocab_size:
            contenders[UPSTREAM_CHECKPOINTED] = theirs(autocast, checkpointing=True)
            expected = theirs(plain, checkpointing=True)  # in float32 it needs most memory

    flops, moved = work(shape, setting["batch"], model)
    return Problem(
        batch,
        contenders,
        reference=expected,
        limit=1e-4 if setting["dtype"] == "float32" else 0.05,  # relative, of the loss and of the gradient's norm
        flops=flops,
        bytes=moved,
    )


def tokens_and_labels(shape: ModelShape, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.randint(shape.vocab_size, (batch, shape.tokens), device=device)
    return {"tokens": tokens, "labels": torch.arange(batch, device=device) * 37 % CLASSES}


def bits_and_inputs(net: Infinity, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What self-correction makes of random features: the bits that correct, and the inputs with flips."""
    schedule = net.schedule
    found = bitwise_residual_quantize(
        torch.randn(batch, net.config.bits, *schedule.finest, device=device),
        schedule,
        next_input="bilinear",
        flip_probability=self_correction(len(schedule)),
    )
    return {"inputs": found.teacher_forcing, "bits": found.bits}


def work(shape: ModelShape, batch: int, model: nn.Module) -> tuple[float, float]:
    """Operations and bytes of a step, without what is small beside them."""
    schedule, width = shape.schedule, shape.width
    pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))
    forward = 2.0 * batch * (shape.tokens * weights_of_a_token(shape) + 2 * shape.depth * width * pairs)
    # AdamW reads weight, gradient and two moments and writes all but the gradient, which backward wrote; both passes
    # read the weights: ten times four bytes
    return 3 * forward, 40.0 * sum(p.numel() for p in model.parameters())


SUITE = Suite(
    "training_step",
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "dtype": "float32"},
            {"grids": "1,2,3,4", "depth": 1, "width": 64, "batch": 2, "dtype": "bfloat16"},
            {"model": "Infinity-tiny", "batch": 1, "dtype": "float32"},
            # a rectangle, and texts of one token and of many
            {"model": "Infinity-tiny", "grids": "infinity-0.06M-0.571", "batch": 1, "dtype": "float32"},
            {"model": "Infinity-tiny", "batch": 2, "texts": "1,512", "dtype": "float32"},
        ],
        "cpu": [
            *(
                {"grids": grids, "depth": 4, "width": 256, "batch": batch, "dtype": "float32"}
                for grids, batch in (("var-256", 2), ("var-512", 1))
            ),
            {"model": "Infinity-2B-0.06M", "depth": 2, "batch": 1, "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d16", "batch": 32, "dtype": "bfloat16"},
            {"model": "VAR-d30", "batch": 16, "dtype": "bfloat16"},
            # two models of 2.2 billion weights with AdamW hold 70 GB
            *(
                {"model": model, "batch": batch, "dtype": "bfloat16"}
                for model, batch in (("Infinity-2B-0.06M", 8), ("Infinity-2B-0.25M", 2), ("Infinity-2B", 1))
            ),
        ],
    },
    (OURS, GRAPHS, CHECKPOINTED, COMPILED, "upstream", UPSTREAM_CHECKPOINTED),
    build,
    graphs=False,
)
