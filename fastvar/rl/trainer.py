"""VMR-GRPO: a next-scale model learns from rewards, its coarse and its fine scales in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from fastvar.files import write_json
from fastvar.models import Model
from fastvar.ops import PolicyLoss, group_advantages
from fastvar.random import derive
from fastvar.rl.adapters import has_adapters, plain
from fastvar.rl.agreement import check_agreement
from fastvar.rl.ahead import RewardsAhead
from fastvar.rl.config import RLConfig
from fastvar.rl.measuring import Clock, UpdateMeasurements, fingerprint, peak_memory, reward_metrics
from fastvar.rl.micro_batches import MicroBatch, micro_batches
from fastvar.rl.preflight import before_the_first_step
from fastvar.rl.processes import Processes, RewardError, make_accelerator
from fastvar.rl.progress import Progress
from fastvar.rl.prompts import Prompts
from fastvar.rl.resuming import begin, run_settings
from fastvar.rl.returns import middle_returns
from fastvar.rl.rewards import Reward, RewardSum
from fastvar.rl.rollout import Rollout, roll_out
from fastvar.rl.rows import indices, taken
from fastvar.rl.run_evaluations import RunEvaluations
from fastvar.rl.scores import score
from fastvar.rl.update import part_loss, part_of, token_totals
from fastvar.rl.wrapping import CalledPolicy, gather_for_methods
from fastvar.training.checkpoints import Checkpoints
from fastvar.training.ema import EMA
from fastvar.training.graphed import GraphedStep, check_alone
from fastvar.training.interrupts import Interrupted, Interrupts
from fastvar.training.lock import locked
from fastvar.training.log import RunLog, say
from fastvar.training.loop import launched_precision, parameter_groups
from fastvar.training.sharded import Blueprint, mesh_of, shard

Policy = TypeVar("Policy", bound=Model)
_SHOWN = (
    *("reward", "kl", "clip_fraction", "entropy", "evaluation/return"),
    *("seconds_rollout", "seconds_reward", "seconds_update"),
)


class Graded(NamedTuple):
    """What a rollout's rows are worth.

    Attributes:
        advantages: (n,) of this process's rows.
        mask: (n, L') which tokens are to be trained.
        totals: (K',) sums of all processes' masks over each scale's tokens.
        parts: the rows of each micro-batch; none where there is nothing to learn.
        metrics: for the log.
    """

    advantages: torch.Tensor
    mask: torch.Tensor
    totals: torch.Tensor
    parts: list[MicroBatch]
    metrics: dict[str, float]


class VMRGRPOTrainer(Generic[Policy]):
    """Trains a model on a reward, on one process or, under `accelerate launch` or `torchrun`, on several.

    Each iteration draws a rollout (`roll_out`), scores it (`score`), makes returns (`middle_returns`) and advantages
    (`group_advantages`) of the scores, and one or more optimizer steps (`segment_loss`). The policy stays in evaluation
    mode: what is trained is what is drawn from. An interrupted run goes on where it stopped, with the same numbers.

    Args:
        policy: the model, with its tokenizer; trained in place. With adapters (`add_adapters`) only they are.
        reward: what scores images; a reward alone stands for a sum of it.
        prompts: what to draw; a list of texts, or `Prompts` for class labels and reference subjects.
        config: how.
        output: the run's folder: `model/` (averaged weights), `best/` (those of the best evaluation), `metrics.jsonl`,
            `pictures/`, `tensorboard/`, `checkpoints/`.
        reference: the model that the KL holds the policy to, and that draws continuations if it is to. By default the
            policy as it is now, if it is needed: without its adapters, or else a copy. Where FSDP2 shards the policy it
            is sharded too, in place.
        evaluation: prompts of the evaluations; `prompts` by default.

    Raises:
        ValueError: settings that do not fit, nothing to train, a prompt or a reference that cannot be drawn or scored.
        RewardError: a reward misbehaves on a blank picture.
        OSError: no room for a checkpoint.
    """

    def __init__(
        self,
        policy: Policy,
        reward: RewardSum,
        prompts: Prompts | Sequence[str],
        config: RLConfig,
        output: Path,
        reference: Model | None = None,
        evaluation: Prompts | Sequence[str] | None = None,
    ) -> None:
        config.check()
        launched_precision(config.precision)
        if config.middle >= len(policy.schedule):
            raise ValueError(f"RLConfig: middle: expected below {len(policy.schedule)}, got {config.middle}")
        if not isinstance(reward, RewardSum):
            reward = RewardSum({getattr(reward, "__name__", type(reward).__name__): reward})
        self.prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
        evaluation = self.prompts if evaluation is None else evaluation
        evaluation = evaluation if isinstance(evaluation, Prompts) else Prompts(evaluation)
        self.reward, self.config, self.output = reward, config, output
        self.accelerator = make_accelerator()
        self.processes = Processes(self.accelerator)
        self.drawn_prompts = self.processes.drawn_prompts(config.prompts, config.group_size)
        if self.drawn_prompts != config.prompts and self.processes.main:
            say(
                f"RLConfig: prompts: rollouts draw and score {self.drawn_prompts} instead of {config.prompts}, which "
                f"{self.processes.count} processes share evenly; those beyond {config.prompts} are not trained"
            )
        check_alone("RLConfig: update_graphs", config.update_graphs, self.accelerator)

        policy = policy.to(self.accelerator.device).eval()
        policy.gradient_checkpointing = config.gradient_checkpointing
        policy.tokenizer.requires_grad_(False).eval()
        policy.keep_texts()
        written = output if self.processes.main else None
        self.processes.rewarded(lambda: before_the_first_step(policy, self.prompts, evaluation, reward, written))
        self.fingerprint = fingerprint(policy)
        blueprint: Blueprint[Model] = Blueprint(policy, sharded=self.processes.sharded)
        optimizer = torch.optim.AdamW(
            parameter_groups(policy, config.weight_decay), lr=config.learning_rate, betas=config.betas
        )
        self.model, self.optimizer = self.accelerator.prepare(CalledPolicy(policy), optimizer)
        self.policy: Policy = self.accelerator.unwrap_model(self.model).policy
        gather_for_methods(self.model)
        self.ema = EMA(blueprint, config.ema_decay)
        self.reference = reference
        if reference is None and (config.loss.kl_weight != 0 or config.reference_continues):
            self.reference = policy if has_adapters(policy) else blueprint.clone()
        elif reference is not None and mesh_of(reference) is None and (mesh := mesh_of(policy)):
            shard(reference, mesh)
        if self.reference is not None and self.reference is not policy:
            self.reference.to(self.accelerator.device).requires_grad_(False).eval()
        self.whole: Callable[[Any], Any] = blueprint.whole
        others = [] if self.reference is None else [self.reference]
        self.graphed = GraphedStep(self._part, self.model, *others) if config.update_graphs else self._part

        self.progress = Progress()
        self.evaluations = RunEvaluations(evaluation, reward, config, output, self.processes, self.progress, self.whole)
        self.checkpoints = Checkpoints(
            self.accelerator,
            output,
            self.model,
            self.optimizer,
            self.ema,
            keep=config.keep,
            minutes=config.save_minutes,
            progress=self.progress,
        )

    def train(self) -> Policy:
        """Run all iterations, or those that are left, and return the averaged policy; it is saved in `output/model`. If
        it had adapters they are merged, and it is on the CPU. Where FSDP2 has sharded it, it is put together on the CPU
        of the first process; others get their part of it.

        Raises:
            ValueError: `output` holds a run with other settings.
            RewardError: a reward misbehaved; what was done before is saved.
            Interrupted: SIGINT or SIGTERM came; the iteration was finished and saved.
            RuntimeError: rollout and training do not agree, or too many updates in a row had a gradient that is not
                finite.

        Called again, with the model that the run began with, it goes on from its last checkpoint.
        """
        config, output, main = self.config, self.output, self.processes.main
        with locked(output, active=main), Interrupts() as interrupts:
            settings = run_settings(config, self.policy, self.model, self.fingerprint, self.reward, self.prompts)
            first = begin(output, settings, config, self.checkpoints, self.processes)
            if main:
                write_json(output / "rewards.json", self.reward.descriptions())
            log = RunLog(output, first, config.iterations, title="vmr-grpo", shown=_SHOWN, active=main)
            try:
                if first == 0 and config.evaluate_every:
                    log.write(0, self.evaluate(0, log))
                for iteration in range(first, config.iterations):
                    if self._too_far():
                        break
                    self._iteration_and_what_follows(iteration, log, interrupts)
            finally:
                log.close()
            averaged: Policy = self.whole(self.ema.model)
            if main or not mesh_of(averaged):
                averaged = plain(averaged)
            if main:
                averaged.save_pretrained(output / "model")
            self.accelerator.wait_for_everyone()
            return averaged

    def _iteration_and_what_follows(self, iteration: int, log: RunLog, interrupts: Interrupts) -> None:
        """One iteration, and the evaluation, the line of metrics and the checkpoint that are due after it."""
        config, checkpoints, done = self.config, self.checkpoints, iteration + 1
        try:
            metrics = self.iteration(iteration)
        except RewardError:  # nothing was learned from it yet
            checkpoints.save(iteration)
            raise
        final = done == config.iterations or self._too_far()
        log.advance()
        if config.evaluate_every and (done % config.evaluate_every == 0 or final):
            try:
                metrics |= self.evaluate(done, log)
            except RewardError:
                log.write(done, metrics)
                checkpoints.save(done)
                raise
        if done % config.log_every == 0 or final or "evaluation/return" in metrics:
            log.write(done, metrics)
        stop = self.processes.any(interrupts.received is not None)
        due = self.processes.any(checkpoints.due())
        if stop or due or final or done % config.save_every == 0:
            saved = checkpoints.save(done)
        if stop and not final:
            raise Interrupted(interrupts.received or "SIGTERM", done, saved)

    def _too_far(self) -> bool:
        """Whether the last update's KL ends the run."""
        return 0 < self.config.stop_kl < self.progress.kl

    def iteration(self, iteration: int) -> dict[str, float]:
        """One rollout and its updates; what was measured."""
        clock = Clock()
        with RewardsAhead(self.reward) as ahead:
            with clock.part("rollout"):
                rollout = self.roll_out(iteration, ahead.each_part)
            with clock.part("reward"):
                graded = self.grade(rollout, ahead.answers)
        rollout = rollout._replace(images=rollout.images.new_empty(0))  # a slice would keep their memory
        measured: dict[str, float] = {}
        old_log_probs = None
        with clock.part("update"):
            for _ in range(self.config.updates):
                metrics, log_probs = self.update(rollout, graded, old_log_probs)
                measured |= metrics
                if old_log_probs is None:
                    old_log_probs = log_probs if self.config.rescore else rollout.log_probs
        self.progress.kl = measured.get("kl", 0.0)
        segments = ("whole", "coarse", "fine")
        return {
            **graded.metrics,
            **measured,
            "segment": float(segments.index(self.config.segment(iteration))),
            "skipped": float(self.progress.skipped),
            "skipped_in_all": float(self.progress.skipped_in_all),
            "rollout_tokens": self.processes.total(float(rollout.passed_tokens)),
            **clock.seconds,
            "memory_mib": peak_memory(),
        }

    def roll_out(self, iteration: int, each_part: Callable[[torch.Tensor, Prompts], None] | None = None) -> Rollout:
        """This process's rows of an iteration's rollout; it follows from the seed, the iteration and the weights.
        `each_part` as `fastvar.rl.roll_out` has it."""
        config = self.config
        generator = torch.Generator().manual_seed(derive(config.seed, "prompts", iteration))
        chosen = torch.randint(len(self.prompts), (config.prompts,), generator=generator).tolist()
        chosen += chosen[-1:] * (self.drawn_prompts - config.prompts)
        with self._autocast(), torch.no_grad():
            return self.model(
                roll_out,
                self.prompts.take(chosen),
                segment=config.segment(iteration),
                group_size=config.group_size,
                middle=config.middle,
                continuations=config.continuations,
                seed=derive(config.seed, "rollout", iteration),
                options=config.rollout,
                rows=self.processes.share(self.drawn_prompts * config.group_size),
                continue_with=self.reference if config.reference_continues else None,
                each_part=each_part,
            )

    def grade(self, rollout: Rollout, known: Callable[[], dict[str, Reward]] = dict) -> Graded:
        """Scores, returns and advantages of this process's rows within the groups of all processes. `known()` is what
        rewards have been asked already, by name.

        Raises:
            RewardError: a reward misbehaved, here or on another process.
        """
        config, processes, device = self.config, self.processes, rollout.tokens.device
        schedule = self.policy.schedule
        scores = processes.rewarded(
            lambda: score(rollout, self.reward, schedule, use_mask=config.use_mask, known=known())
        )
        asked, drawn = (number * config.group_size for number in (config.prompts, self.drawn_prompts))
        images = asked * rollout.continuations  # all others count for nothing
        each = {name: processes.gather(values.to(device))[:images] for name, values in scores.each.items()}
        processes.rewarded(lambda: self.reward.check(each))
        combined = self.reward.combine(each)
        returns = middle_returns(combined, rollout.continuations, eta=config.eta)
        advantages = group_advantages(
            returns,
            config.group_size,
            normalise=config.normalise,
            spread_floor=config.spread_floor,
        ).float()
        advantages = torch.nn.functional.pad(advantages, (0, drawn - asked))
        # A group whose returns are equal has advantages of exactly 0.
        spreads = (advantages.view(-1, config.group_size) != 0).any(1).repeat_interleave(config.group_size)

        rows = slice(rollout.rows.start, rollout.rows.stop)
        mask = torch.ones_like(rollout.log_probs)
        # A mask holds only if all processes have one: a reward without was decided everywhere.
        masked = processes.all(scores.mask is not None)
        if scores.mask is not None and masked:
            mask = mask * scores.mask
        own = mask[: max(asked - rollout.rows.start, 0)]
        metrics = {
            **reward_metrics(
                self.reward,
                each,
                combined.view(-1, config.group_size, rollout.continuations),
                returns.view(-1, config.group_size),
            ),
            "groups_without_spread": 1 - float(spreads[:asked].float().mean()),
            "mask_share": processes.total(float(own.sum())) / processes.total(own.numel()),
        }
        if config.filter_groups:
            mask = mask * spreads[rows, None]
        mask[len(own) :] = 0
        schedule = schedule.with_num_tokens(rollout.tokens.shape[1])
        mask[:, : schedule.starts[rollout.first_scale]] = 0
        totals = processes.sum(token_totals(mask, schedule))
        return Graded(advantages[rows], mask, totals, micro_batches(mask, config.micro_batch, processes), metrics)

    def update(
        self, rollout: Rollout, graded: Graded, old_log_probs: torch.Tensor | None
    ) -> tuple[dict[str, float], torch.Tensor]:
        """One optimizer step; what it measured, and the log-probabilities (n, L') before it (0 where a row was left
        out). A gradient that is not finite is dropped and counted; where there is nothing to learn, none is made. The
        host waits for the device once, to know whether the gradient is finite."""
        config, accelerator, parts = self.config, self.accelerator, graded.parts
        log_probs = torch.zeros_like(rollout.log_probs)
        if not parts:
            return {"gradient_norm": 0.0}, log_probs
        schedule = self.policy.schedule.with_num_tokens(rollout.tokens.shape[1])
        measurements = UpdateMeasurements()
        for number, (rows, counts) in enumerate(parts):
            mask = graded.mask if counts else torch.zeros_like(graded.mask)
            with accelerator.no_sync(self.model) if number + 1 < len(parts) else nullcontext(), self._autocast():
                inputs = part_of(self.policy, rollout, graded.advantages, rows, mask, graded.totals, old_log_probs)
                loss = PolicyLoss(**self.graphed(rollout.first_scale, **inputs))
            if counts:
                log_probs.index_copy_(0, indices(rows, log_probs.device), loss.log_probs)
            measurements.add(loss, token_totals(taken(mask, rows), schedule), graded.totals)
        gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        measured = measurements.read(
            self.processes, log_probs - rollout.log_probs, graded.mask, schedule, gradient_norm
        )
        metrics, norm = measured.metrics, measured.gradient_norm
        if old_log_probs is None:
            metrics |= check_agreement(measured.mean_gap, measured.largest_gaps, config.largest_difference)
        if math.isfinite(norm):
            self.optimizer.step()
            self.progress.skipped = 0
            self.ema.update(self.policy)
        else:
            self.progress.skipped += 1
            self.progress.skipped_in_all += 1
        self.optimizer.zero_grad(set_to_none=not config.update_graphs)
        if self.progress.skipped > config.bad_steps:
            raise RuntimeError(
                f"VMRGRPOTrainer: {self.progress.skipped} updates in a row had a gradient that is not finite"
            )
        return {**metrics, "gradient_norm": norm}, log_probs

    def _part(self, first_scale: int, **inputs: Any) -> dict[str, torch.Tensor]:
        """Forward, loss and backward of a micro-batch."""
        config = self.config
        loss: PolicyLoss = self.model(
            part_loss, config.loss, first_scale, config.rollout.temperature, self.reference, **inputs
        )
        # The parts add up to the whole batch's loss; processes average their gradients.
        self.accelerator.backward(loss.loss * self.accelerator.num_processes)
        return loss._asdict()

    def evaluate(self, done: int, log: RunLog) -> dict[str, float]:
        """Fixed prompts and seeds on the averaged weights: metrics and a picture; the best are kept in `best/`.

        Raises:
            RewardError: a reward misbehaved.
        """
        return self.evaluations(self.ema.model, done, log)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
