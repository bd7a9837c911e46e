"""What VMR-GRPO saves by forking cached states, sharing a subject's prefix and passing no more tokens than it must.

Each case is a part of an iteration, or all of it, of a VAR or an Infinity on random weights, the latter with texts of
several lengths; "without" does the same work without what saves:

* "coarse rollout": G coarse segments with K = 2 continuations that fork the cached state, against G K whole images;
* "fine rollout": G continuations of one coarse segment, against G whole images;
* "subject update": forward and backward with one prefix a group, against a prefix for every row;
* "coarse update": forward and backward on the coarse tokens, against all tokens with the loss on the coarse ones;
* "micro-batches", "checkpointing": forward and backward by quarters of the rows, or with blocks recomputed, against
  plain; they save memory and cost time;
* "coarse iteration", "fine iteration": rollout with a subject, a trivial reward, update and AdamW step; with forks, one
  prefix a group and no tokens after the segment, against whole images with a prefix for every row and all tokens.

"fastvar, graphs" is an update whose forward and backward passes are replayed.

Rollouts decode their images, as training does. Of a rollout the log-probabilities are checked against teacher forcing,
of an update all gradients against those of the objective written out on logits. "bfloat16" is autocast over float32
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cases import OURS, Problem, Setting, Suite
from benchmarks.shapes import ModelShape
from benchmarks.suites.generate import CLASSES, shape_of
from benchmarks.suites.training_step import GRAPHS, NO_GRAPHS, Graphed
from benchmarks.upstream_infinity import TEXT_CHANNELS
from fastvar.models import (
    VAR,
    BSQTokenizer,
    BSQTokenizerConfig,
    CharacterTextEncoder,
    Infinity,
    InfinityConfig,
    Model,
    SamplingOptions,
    VARConfig,
    VQTokenizer,
    VQTokenizerConfig,
)
from fastvar.ops import group_advantages
from fastvar.rl import PolicyLossOptions, Prompts, Rollout, middle_returns, roll_out, token_totals
from fastvar.rl.prompts import subject_of
from fastvar.rl.update import part_loss, part_of
from fastvar.training.loop import parameter_groups

CONTINUATIONS = 2
TEXT = "a photograph of a lighthouse on a cliff above the sea"  # prompts are as much of it as they are long
PARTS = 4  # micro-batches
LOSS, OPTIONS = PolicyLossOptions(), SamplingOptions(batch_size=1024)
Gradients = dict[str, torch.Tensor]


class Iteration(NamedTuple):
    """What an iteration drew, what that was worth, and the gradients."""

    rollout: Rollout
    advantages: torch.Tensor
    gradients: Gradients


class Job:
    """A policy on random weights, its prompts and all that is done with them."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.device, self.middle, self.group_size = device, setting["middle"], setting["group_size"]
        self.rows = setting["prompts"] * self.group_size
        count = setting["prompts"]
        with device:
            self.policy = make_policy(setting).to(device).eval()
            references = torch.rand(count, 3, *self.policy.tokenizer.config.image_size)
        classes = None if self.policy.config.text_length else torch.arange(count) * 37 % CLASSES
        self.prompts = Prompts([TEXT[: 20 + 11 * i % 30] for i in range(count)], classes)
        self.subjects = Prompts(self.prompts.texts, classes, references)
        self.coarse = self.policy.schedule.starts[self.middle]  # tokens of the coarse segment
        # the learning rate is 0: every call is the same one
        self.optimizer = torch.optim.AdamW(parameter_groups(self.policy, 0.05), lr=0.0, betas=(0.9, 0.95))
        self.half = setting["dtype"] == "bfloat16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.half)
        self.graphed = Graphed(self.part, self.policy)

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def draw(self, prompts: Prompts, segment: Any, times: int = 1) -> Rollout:
        """A rollout with all that saves, of `times` as many rows a group."""
        with self.autocast:
            return roll_out(
                self.policy,
                prompts,
                segment=segment,
                group_size=self.group_size * times,
                middle=self.middle,
                continuations=CONTINUATIONS,
                seed=1,
                options=OPTIONS,
            )

    @torch.no_grad()
    def draw_apart(self, segment: str) -> Rollout:
        """As many images with a subject as `draw` makes, each from the start and with a prefix of its own. Of those
        that would continue one coarse segment the first one is to be trained."""
        times = CONTINUATIONS if segment == "coarse" else 1
        images, trained = (self.prompts.repeated(self.group_size * each) for each in (times, 1))
        with self.autocast:
            subject = subject_of(self.policy, self.subjects)
            assert subject is not None
            subject = subject.repeat_interleave(self.group_size * times, 0)
            drawn = self.policy.generate(images.conditions, subject=subject, seed=1, log_probs=True)
        return Rollout(
            prompts=trained,
            conditions=self.policy.batches(trained.conditions, self.rows)[0],
            tokens=drawn.tokens[::times],
            log_probs=drawn.log_probs[::times],
            images=drawn.images,
            continuations=times,
            first_scale=self.middle if segment == "fine" else 0,
            rows=range(self.rows),
            group_size=1,
            subject=subject[::times],
            passed_tokens=0,
        )

    # -- updates -----------------------------------------------------------------------------------------------------

    def mask(self, rollout: Rollout) -> torch.Tensor:
        """The tokens of the coarse segment."""
        mask = torch.zeros_like(rollout.log_probs)
        mask[:, : self.coarse] = 1
        return mask

    def update(
        self,
        rollout: Rollout,
        advantages: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        parts: int = 1,
        checkpointing: bool = False,
        graphs: bool = False,
    ) -> Gradients:
        """Gradients of a rollout's loss on the tokens of a mask, or on all of the segment, its rows in parts."""
        self.policy.gradient_checkpointing = checkpointing
        trained = torch.ones_like(rollout.log_probs) if mask is None else mask
        totals = token_totals(trained, self.policy.schedule.with_num_tokens(trained.shape[1])) if parts > 1 else None
        size = len(trained) // parts
        with torch.enable_grad(), self.graphed if graphs else nullcontext(self.part) as run:
            for first in range(0, len(trained), size):
                rows = range(first, first + size)
                run(rollout.first_scale, **part_of(self.policy, rollout, advantages, rows, mask, totals, None))
            return self.gradients() if graphs else self.take_gradients()

    def part(self, first_scale: int, **tensors: Any) -> dict[str, torch.Tensor]:
        """Forward and backward of some rows."""
        with self.autocast:
            loss = part_loss(self.policy, LOSS, first_scale, 1.0, None, **tensors).loss
        loss.backward()
        return {"loss": loss.detach()}

    def gradients(self) -> Gradients:
        return {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}

    def take_gradients(self) -> Gradients:
        """The gradients, which the parameters then have no longer."""
        found = self.gradients()
        self.policy.zero_grad()
        return found

    def iterate(self, segment: str, saving: bool) -> Iteration:
        """Rollout, reward, update and step."""
        rollout = self.draw(self.subjects, segment) if saving else self.draw_apart(segment)
        rewards = rollout.images.float().mean((1, 2, 3))
        advantages = group_advantages(middle_returns(rewards, rollout.continuations), self.group_size)
        masked = segment == "coarse" and not saving
        gradients = self.update(rollout, advantages, mask=self.mask(rollout) if masked else None)
        for name, parameter in self.policy.named_parameters():
            parameter.grad = gradients.get(name)
        self.optimizer.step()
        self.policy.zero_grad()
        return Iteration(rollout, advantages, gradients)

    # -- what is right -----------------------------------------------------------------------------------------------

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Products in float32; of a policy in bfloat16 in TF32, which is exact enough and saves most of the check."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.half else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def forced_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """(n, L') from float32 logits, with a prefix for every row."""
        tokens = rollout.tokens
        inputs = self.policy.tokenizer.teacher_forcing(tokens)[:, : tokens.shape[1] - self.policy.schedule.lengths[0]]
        logits = self.policy(rollout.prompts.conditions, inputs, subject=rollout.subject)
        if tokens.ndim == 3:  # bits
            return F.logsigmoid(torch.where(tokens, logits, -logits)).sum(-1)
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def expected_gradients(self, rollout: Rollout, advantages: torch.Tensor, end: int) -> Gradients:
        """Gradients of -sum w A log p / sum w over the segment's tokens before `end`, with w = (h w)^-alpha."""
        schedule = self.policy.schedule.with_num_tokens(rollout.tokens.shape[1])
        weights = [float(n) ** -LOSS.panw_alpha for n in schedule.lengths for _ in range(n)]
        weight = torch.tensor(weights, device=self.device)
        weight[: schedule.starts[rollout.first_scale]] = 0
        weight[end:] = 0
        self.policy.gradient_checkpointing = True
        with torch.enable_grad(), self.exact():
            gain = (weight * advantages[:, None] * self.forced_log_probs(rollout)).sum()
            (-gain / (weight.sum() * len(advantages))).backward()
        return self.take_gradients()

    @torch.no_grad()
    def rollout_error(self, found: Rollout, images: int) -> float:
        """How much its log-probabilities differ from teacher forcing, on average; inf for other images than wanted."""
        right = len(found.images) == images and bool((found.images >= 0).all() and (found.images <= 1).all())
        with self.exact():
            gaps = self.forced_log_probs(found) - found.log_probs
        return gaps.abs().mean().item() if right else float("inf")

    def iteration_error(self, found: Iteration, images: int, end: int) -> float:
        expected = self.expected_gradients(found.rollout, found.advantages, end)
        return max(self.rollout_error(found.rollout, images), gradient_error(found.gradients, expected))


def make_policy(setting: Setting) -> Model:
    """A model with a subject prefix whose blocks and head count, and a tokenizer of the public shape, or a narrow one
    on CPUs."""
    shape = shape_of(setting)
    sizes = {"depth": shape.depth, "embed_dim": shape.width, "num_heads": shape.heads}
    narrow = {"channels": 16, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 8}
    make = _var if shape.vocab_size else _infinity
    policy = make(
        shape,
        {} if setting["size"] == "gpu" else narrow,
        {**sizes, "subject": "block_causal", "gate_init": 1.0},
    )
    policy.tokenizer.requires_grad_(False).eval()
    with torch.no_grad():
        policy.head.weight.mul_(50)  # starts at a fiftieth, where all tokens are about as likely whatever the blocks do
    return policy


def _var(shape: ModelShape, of_tokenizer: dict[str, Any], of_model: dict[str, Any]) -> VAR:
    common: dict[str, Any] = {"grids": shape.schedule.grids, "vocab_size": shape.vocab_size}
    common["code_channels"] = shape.channels
    tokenizer = VQTokenizer(VQTokenizerConfig(**common, **of_tokenizer))
    return VAR(VARConfig(**common, **of_model, num_classes=CLASSES), tokenizer)


def _infinity(shape: ModelShape, of_tokenizer: dict[str, Any], of_model: dict[str, Any]) -> Infinity:
    common: dict[str, Any] = {"grids": shape.schedule.grids, "bits": shape.channels}
    tokenizer = BSQTokenizer(BSQTokenizerConfig(**common, **of_tokenizer))
    return Infinity(InfinityConfig(**common, **of_model), tokenizer, CharacterTextEncoder(TEXT_CHANNELS))


def gradient_error(found: Gradients, expected: Gradients) -> float:
    """The norm of the difference relative to that of what is expected; inf for those of other parameters."""
    if found.keys() != expected.keys():
        return float("inf")

    def squares(gradients: Gradients) -> float:
        return sum(gradient.double().square().sum().item() for gradient in gradients.values())

    difference = {name: found[name] - gradient for name, gradient in expected.items()}
    return (squares(difference) / squares(expected)) ** 0.5


def rollout_problem(job: Job, segment: str) -> Problem:
    times = CONTINUATIONS if segment == "coarse" else 1
    return _problem(
        lambda: job.draw(job.prompts, segment),
        lambda: job.draw(job.prompts, "whole", times),
        check=lambda found, _: job.rollout_error(found, job.rows * times),
    )


def update_problem(job: Job, case: str) -> Problem:
    rollout = job.draw(job.subjects if case == "subject update" else job.prompts, "whole")
    advantages = group_advantages(torch.randn(job.rows, device=job.device), job.group_size)
    saved: dict[str, Any] = {"parts": PARTS} if case == "micro-batches" else {"checkpointing": case == "checkpointing"}
    cheap, dear, mask = rollout, rollout, None
    if case == "subject update":
        dear = rollout._replace(group_size=1)
    elif case == "coarse update":
        cheap = rollout._replace(
            tokens=rollout.tokens[:, : job.coarse].clone(), log_probs=rollout.log_probs[:, : job.coarse].clone()
        )
        mask = job.mask(rollout)
    end = job.coarse if case == "coarse update" else job.policy.schedule.num_tokens
    graphs = job.device.type == "cuda" and job.policy.config.depth <= 16

    def replayed() -> Gradients:
        for _ in range(job.graphed.calls_before_a_replay()):
            replayed()
        return job.update(cheap, advantages, **saved, graphs=True)

    return _problem(
        lambda: job.update(cheap, advantages, **saved),
        lambda: job.update(dear, advantages, mask=mask),
        replayed if graphs else NO_GRAPHS,
        reference=lambda: job.expected_gradients(rollout, advantages, end),
        check=gradient_error,
    )


def iteration_problem(job: Job, segment: str) -> Problem:
    images = job.rows * (CONTINUATIONS if segment == "coarse" else 1)
    end = job.coarse if segment == "coarse" else job.policy.schedule.num_tokens
    return _problem(
        lambda: job.iterate(segment, saving=True),
        lambda: job.iterate(segment, saving=False),
        check=lambda found, _: job.iteration_error(found, images, end),
    )


def _problem(
    saving: Callable[[], Any],
    without: Callable[[], Any],
    graphs: Callable[[], Any] | str = "only of updates",
    **options: Any,
) -> Problem:
    return Problem({}, {OURS: saving, GRAPHS: graphs, "without": without}, **options)


def build(setting: Setting, device: torch.device) -> Problem:
    job, (what, kind) = Job(setting, device), setting["case"].rpartition(" ")[::2]
    if kind == "rollout":
        problem = rollout_problem(job, what)
    elif kind == "iteration":
        problem = iteration_problem(job, what)
    else:
        problem = update_problem(job, setting["case"])
    # Of log-probabilities on average, of gradients relative to their norm.
    problem.limit = 1e-3 if setting["dtype"] == "float32" else 0.1
    return problem


CASES = (
    *("coarse iteration", "fine iteration", "coarse rollout", "fine rollout"),
    *("subject update", "coarse update", "checkpointing", "micro-batches"),
)


def _settings(cases: tuple[str, ...], **shape: Any) -> list[dict[str, Any]]:
    return [{"case": case, **shape} for case in cases]


SUITE = Suite(
    "vmr_grpo_step",
    {
        "tiny": [
            *_settings(CASES, model="tiny", middle=2, prompts=2, group_size=2, dtype="float32"),
            *_settings(
                (*CASES[:2], *CASES[4:6]),
                **{"model": "Infinity-tiny", "grids": "1,2,3x4", "middle": 2, "prompts": 2, "group_size": 2},
                dtype="float32",
            ),
        ],
        "cpu": [
            *_settings(
                (*CASES[:2], *CASES[4:6]),
                **{"model": "Infinity-tiny", "middle": 4, "prompts": 1, "group_size": 8, "dtype": "float32"},
            ),
            *_settings(CASES, model="demo", middle=3, prompts=2, group_size=8, dtype="float32"),
            *_settings(
                CASES[:1], grids="var-256", depth=4, width=128, middle=8, prompts=1, group_size=4, dtype="float32"
            ),
            *_settings(
                CASES[4:5], grids="var-256", depth=8, width=128, middle=8, prompts=1, group_size=8, dtype="float32"
            ),
        ],
        "gpu": [
            *_settings(CASES, model="VAR-d16", middle=8, prompts=4, group_size=8, dtype="bfloat16"),
            # 8 GB of weights, 16 of the optimizer's, 8 of gradients, and 2 MB a token of activations without
            # checkpointing: 76 GB where each of 16 rows has a prefix
            *_settings(
                ("coarse iteration", "fine iteration", "subject update", "checkpointing"),
                **{"model": "VAR-d30", "middle": 8, "prompts": 2, "group_size": 8, "dtype": "bfloat16"},
            ),
            # 35 GB of weights, moments and gradients, and more activations a token than VAR-d30 has
            *_settings(
                ("coarse iteration", "fine iteration", "subject update"),
                **{"model": "Infinity-2B-0.06M", "middle": 4, "prompts": 1, "group_size": 8, "dtype": "bfloat16"},
            ),
        ],
    },
    (OURS, GRAPHS, "without"),
    build,
    graphs=False,
)
