"""VMR-GRPO: a VAR learns from rewards, its coarse and its fine scales in turns."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.tensor import DTensor

from fastvar.files import json_text
from fastvar.models import VAR
from fastvar.ops import PolicyLoss, group_advantages
from fastvar.pictures import image_grid, save_picture
from fastvar.rl.adapters import has_adapters, merged
from fastvar.rl.choose_middle import intraclass_correlation
from fastvar.rl.config import FREE, TOLERANCES, RLConfig
from fastvar.rl.evaluate import draw_evaluation, score_evaluation, summarise
from fastvar.rl.measuring import Clock, fingerprint, loss_metrics, peak_memory, spread
from fastvar.rl.preflight import before_the_first_step
from fastvar.rl.prompts import Prompts
from fastvar.rl.returns import middle_returns
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rollout import Rollout, roll_out
from fastvar.rl.rows import indices, taken
from fastvar.rl.scores import score
from fastvar.rl.update import part_loss, part_of, token_totals
from fastvar.rl.wrapping import CalledPolicy, gather_for_methods
from fastvar.training.checkpoints import Checkpoints
from fastvar.training.ema import EMA
from fastvar.training.graphed import GraphedStep, check_alone
from fastvar.training.interrupts import Interrupted, Interrupts
from fastvar.training.lock import locked
from fastvar.training.log import RunLog
from fastvar.training.loop import launched_precision, parameter_groups
from fastvar.training.settings import check_enough_steps, check_same_settings, write_settings

_T = TypeVar("_T")
_SHOWN = (
    *("reward", "kl", "clip_fraction", "entropy", "evaluation/return"),
    *("seconds_rollout", "seconds_reward", "seconds_update"),
)


class VMRGRPOTrainer:
    """Trains a VAR on a reward, on one process or, under `accelerate launch` or `torchrun`, on several.

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
        reference: the model that the KL holds the policy to. By default the policy as it is now, if the weight is not
            0: without its adapters, or else a copy.
        evaluation: prompts of the evaluations; `prompts` by default.

    Raises:
        ValueError: settings that do not fit, nothing to train, a prompt or a reference that cannot be drawn or scored.
        RewardError: a reward misbehaves on a blank picture.
        OSError: no room for a checkpoint.
    """

    def __init__(
        self,
        policy: VAR,
        reward: RewardSum,
        prompts: Prompts | Sequence[str],
        config: RLConfig,
        output: Path,
        reference: VAR | None = None,
        evaluation: Prompts | Sequence[str] | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        config.check()
        launched_precision(config.precision)
        if not isinstance(reward, RewardSum):
            reward = RewardSum({getattr(reward, "__name__", type(reward).__name__): reward})
        if config.middle >= len(policy.schedule):
            raise ValueError(f"RLConfig: middle: expected below {len(policy.schedule)}, got {config.middle}")
        self.prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
        evaluation = self.prompts if evaluation is None else evaluation
        self.evaluation = evaluation if isinstance(evaluation, Prompts) else Prompts(evaluation)
        self.reward, self.config, self.output = reward, config, output
        # Which parameters take part depends on the segment and on whether there are references.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[unused]
        )
        processes, count = self.accelerator.num_processes, config.prompts * config.group_size
        sharded = self.accelerator.distributed_type == "FSDP"
        if count % processes or (sharded and config.prompts % processes):
            expected = f"prompts {config.prompts}" if sharded else f"prompts x group_size = {count}"
            raise ValueError(f"VMRGRPOTrainer: expected a number of processes that divides {expected}, got {processes}")
        check_alone("RLConfig: update_graphs", config.update_graphs, self.accelerator)
        self.policy = policy.to(self.accelerator.device).eval()
        self.policy.gradient_checkpointing = config.gradient_checkpointing
        self.policy.tokenizer.requires_grad_(False).eval()
        where = output if self.accelerator.is_main_process else None
        self._rewarded(lambda: before_the_first_step(self.policy, self.prompts, self.evaluation, reward, where))
        self.reference = reference
        if reference is None and config.loss.kl_weight != 0:
            self.reference = policy if has_adapters(policy) else policy.clone()
        if self.reference is not None and self.reference is not policy:
            self.reference.to(self.accelerator.device).requires_grad_(False).eval()
        self.fingerprint = fingerprint(policy)
        self.ema = EMA(policy, config.ema_decay)
        optimizer = torch.optim.AdamW(
            parameter_groups(policy, config.weight_decay), lr=config.learning_rate, betas=config.betas
        )
        self.model, self.optimizer = self.accelerator.prepare(CalledPolicy(policy), optimizer)
        self.policy = self.accelerator.unwrap_model(self.model).policy
        gather_for_methods(self.model)
        others = [] if self.reference is None else [self.reference]
        self.graphed = GraphedStep(self._part, self.model, *others) if config.update_graphs else self._part
        self.progress = _Progress()
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

    def train(self) -> VAR:
        """Run all iterations, or those that are left, and return the averaged policy; it is saved in `output/model`.

        Raises:
            ValueError: `output` holds a run with other settings.
            RewardError: a reward misbehaved; what was done before is saved.
            Interrupted: SIGINT or SIGTERM came; the iteration was finished and saved.
            RuntimeError: rollout and training do not agree, or too many updates in a row had a gradient that is not
                finite.

        Called again, with the model that the run began with, it goes on from its last checkpoint.
        """
        with locked(self.output, active=self.accelerator.is_main_process), Interrupts() as interrupts:
            return self._train(interrupts)

    def _train(self, interrupts: Interrupts) -> VAR:
        config, output, accelerator, checkpoints = self.config, self.output, self.accelerator, self.checkpoints
        main = accelerator.is_main_process
        settings = self._settings()
        found = checkpoints.newest() if config.resume else None
        first = found or 0
        if found is not None:
            check_same_settings(output / "settings.json", settings, free=FREE)
            check_enough_steps("iterations", config.iterations, found, output)
            checkpoints.load(found)
            if main and first == 0:  # stopped before the first step: its first evaluation is made again
                (output / "metrics.jsonl").unlink(missing_ok=True)
        elif main:
            checkpoints.clear()
            _clear(output)
        if main:
            write_settings(output / "settings.json", settings, found, config.iterations)
        accelerator.wait_for_everyone()
        if found is None:
            checkpoints.save(0)
        log = RunLog(output, first, config.iterations, title="vmr-grpo", shown=_SHOWN, active=main)
        try:
            if first == 0 and config.evaluate_every:
                log.write(0, self.evaluate(0, log))
            for iteration in range(first, config.iterations):
                if self._too_far():
                    break
                try:
                    metrics = self.iteration(iteration)
                except RewardError:  # nothing was learned from it yet
                    checkpoints.save(iteration)
                    raise
                done, last = iteration + 1, iteration + 1 == config.iterations or self._too_far()
                log.advance()
                if config.evaluate_every and (done % config.evaluate_every == 0 or last):
                    try:
                        metrics |= self.evaluate(done, log)
                    except RewardError:
                        log.write(done, metrics)
                        checkpoints.save(done)
                        raise
                if done % config.log_every == 0 or last or "evaluation/return" in metrics:
                    log.write(done, metrics)
                stop = self._total(float(interrupts.received is not None)) > 0
                due = self._total(float(checkpoints.due())) > 0
                if stop or due or last or done % config.save_every == 0:
                    saved = checkpoints.save(done)
                if stop and not last:
                    raise Interrupted(interrupts.received or "SIGTERM", done, saved)
        finally:
            log.close()
        averaged = self._averaged()
        if main:
            averaged.save_pretrained(output / "model")
        accelerator.wait_for_everyone()
        return averaged

    def iteration(self, iteration: int) -> dict[str, float]:
        """One rollout and its updates; what was measured."""
        clock = Clock()
        with clock.part("rollout"):
            rollout = self.roll_out(iteration)
        with clock.part("reward"):
            graded = self.grade(rollout)
            rollout = rollout._replace(images=rollout.images.new_empty(0))  # a slice would keep their memory
        measured: dict[str, float] = {}
        old_log_probs = None
        with clock.part("update"):
            for _ in range(self.config.updates):
                found, log_probs = self.update(rollout, graded, old_log_probs)
                measured |= found
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
            "rollout_tokens": self._total(float(rollout.passed_tokens)),
            **clock.seconds,
            "memory_mib": peak_memory(),
        }

    def roll_out(self, iteration: int) -> Rollout:
        """This process's rows of an iteration's rollout; it follows from the seed, the iteration and the weights."""
        config, accelerator = self.config, self.accelerator
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        chosen = torch.randint(len(self.prompts), (config.prompts,), generator=generator).tolist()
        seed = int(torch.randint(2**31 - 2, (1,), generator=generator))
        share = config.prompts * config.group_size // accelerator.num_processes
        rows = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        with self._autocast(), torch.no_grad():
            return self.model(
                roll_out,
                self.prompts.take(chosen),
                segment=config.segment(iteration),
                group_size=config.group_size,
                middle=config.middle,
                continuations=config.continuations,
                seed=seed,
                options=config.rollout,
                rows=rows,
            )

    def grade(self, rollout: Rollout) -> Graded:
        """Scores, returns and advantages of this process's rows within the groups of all processes.

        Raises:
            RewardError: a reward misbehaved, here or on another process.
        """
        config, device = self.config, rollout.tokens.device
        scores = self._rewarded(lambda: score(rollout, self.reward, self.policy.schedule, use_mask=config.use_mask))
        each = {name: self.accelerator.gather(values.to(device)) for name, values in scores.each.items()}
        self._rewarded(lambda: self.reward.check(each))
        combined = self.reward.combine(each)
        returns = middle_returns(combined, rollout.continuations, eta=config.eta)
        advantages = group_advantages(
            returns,
            config.group_size,
            normalise=config.normalise,
            spread_floor=config.spread_floor,
        ).float()
        groups = returns.view(-1, config.group_size)
        # A group whose returns are equal has advantages of exactly 0.
        spreads = (advantages.view_as(groups) != 0).any(1).repeat_interleave(config.group_size)
        rows = slice(rollout.rows.start, rollout.rows.stop)
        mask = torch.ones_like(rollout.log_probs)
        # A mask holds only if all processes have one: a reward without was decided everywhere.
        masked = self._total(float(scores.mask is not None)) == self.accelerator.num_processes
        if scores.mask is not None and masked:
            mask = mask * scores.mask
        share = self._mean(float(mask.mean()))
        if config.filter_groups:
            mask = mask * spreads[rows, None]
        schedule = self.policy.schedule.with_num_tokens(rollout.tokens.shape[1])
        mask[:, : schedule.starts[rollout.first_scale]] = 0
        metrics = {f"reward/{name}": float(values.nanmean()) for name, values in each.items()}
        metrics |= {f"reward_std/{name}": spread(values[None]) for name, values in each.items()}
        metrics |= {
            "reward": float(self.reward.combine(each, standardise=False).nanmean()),
            "return": float(returns.nanmean()),
            "spread": spread(groups),
            "groups_without_spread": 1 - float(spreads.float().mean()),
            "mask_share": share,
        }
        if rollout.continuations > 1:
            classes = combined.view(-1, config.group_size, rollout.continuations)
            if classes.isfinite().all() and (classes != classes[:, :1, :1]).any():
                metrics["explained_by_coarse"] = intraclass_correlation(classes)
        totals = self.accelerator.reduce(token_totals(mask, schedule), "sum")
        return Graded(advantages[rows], mask, totals, self._parts(mask), metrics)

    def update(
        self, rollout: Rollout, graded: Graded, old_log_probs: torch.Tensor | None
    ) -> tuple[dict[str, float], torch.Tensor]:
        """One optimizer step; what it measured, and the log-probabilities (n, L') before it (0 where a row was left
        out). A gradient that is not finite is dropped and counted; where there is nothing to learn, none is made. The
        host waits for the device once, to know whether the gradient is finite."""
        config, accelerator = self.config, self.accelerator
        log_probs = torch.zeros_like(rollout.log_probs)
        sums: dict[str, torch.Tensor] = {}
        parts = graded.parts
        if not parts:
            return {"gradient_norm": 0.0}, log_probs
        for number, (rows, real) in enumerate(parts):
            mask = graded.mask if real else torch.zeros_like(graded.mask)
            with accelerator.no_sync(self.model) if number + 1 < len(parts) else nullcontext(), self._autocast():
                tensors = part_of(self.policy, rollout, graded.advantages, rows, mask, graded.totals, old_log_probs)
                found = PolicyLoss(**self.graphed(rollout.first_scale, **tensors))
            if real:
                log_probs.index_copy_(0, indices(rows, log_probs.device), found.log_probs)
            part = token_totals(taken(mask, rows), self.policy.schedule.with_num_tokens(mask.shape[1]))
            for name, value in loss_metrics(found, part, graded.totals).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        gaps = torch.where(graded.mask > 0, (log_probs - rollout.log_probs).abs(), 0)
        sums |= {"gap": gaps.sum(dtype=torch.float64), "trained": (graded.mask > 0).sum()}
        gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        metrics, worst, norm = self._read(sums, gaps, gradient_norm)
        gap = metrics.pop("gap") / max(metrics.pop("trained"), 1.0)
        if old_log_probs is None:
            metrics |= self.check_log_probs(gap, worst)
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

    def _part(self, first_scale: int, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Forward, loss and backward of a micro-batch."""
        config = self.config
        found: PolicyLoss = self.model(
            part_loss, config.loss, first_scale, config.rollout.temperature, self.reference, **tensors
        )
        # The parts add up to the whole batch's loss; processes average their gradients.
        self.accelerator.backward(found.loss * self.accelerator.num_processes)
        return found._asdict()

    def check_log_probs(self, mean: float, worst: list[float]) -> dict[str, float]:
        """How much the log-probabilities of rollout and training differ: `mean` over the trained tokens, `worst` of
        each scale.

        Raises:
            RuntimeError: more than rounding: another policy would be trained than was drawn from.
        """
        limit = self.config.largest_difference
        if self.config.updates > 1 and not self.config.rescore:
            limit = min(limit, TOLERANCES[self.config.precision])
        if mean > limit:
            found = f"{mean:.2g} on average (tolerance {limit:g}), {max(worst):.2g} at scale {worst.index(max(worst))}"
            raise RuntimeError(
                f"VMRGRPOTrainer: log-probabilities of rollout and training differ by {found}: cached sampling and "
                "teacher forcing are not the same model (precision? dropout? a patched forward?)"
            )
        return {"rollout_difference": max(worst), "rollout_difference_mean": mean}

    def evaluate(self, done: int, log: RunLog) -> dict[str, float]:
        """Fixed prompts and seeds on the averaged weights: metrics and a picture; the best are kept in `best/`.

        Raises:
            RewardError: a reward misbehaved.
        """
        from accelerate.utils import gather_object

        config, main = self.config, self.accelerator.is_main_process
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        drawn = draw_evaluation(
            self.ema.model,
            self.evaluation,
            samples=config.evaluation_samples,
            options=config.rollout,
            share=(process, processes),
        )
        found = self._rewarded(lambda: score_evaluation(drawn, self.reward))
        parts = gather_object([found]) if processes > 1 else [found]
        evaluation = self._rewarded(lambda: summarise(parts, self.reward))
        total = evaluation.metrics["return"]
        better = total > self.progress.best
        self.progress.best = max(total, self.progress.best)
        if main:
            picture = image_grid(evaluation.images[:64], 8)
            save_picture(picture, self.output / "pictures" / f"step-{done:08d}.png")
            log.picture(done, "samples", picture)
            if better:
                self._averaged().save_pretrained(self.output / "best")
        self.accelerator.wait_for_everyone()
        return {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}

    def _rewarded(self, ask: Callable[[], _T]) -> _T:
        """What `ask` returns; if it raises on one process, all raise."""
        found, error = None, None
        try:
            found = ask()
        except RuntimeError as raised:
            error = raised
        if self._total(float(error is not None)):
            raise RewardError(str(error or "a reward misbehaved on another process")) from error
        return found  # type: ignore[return-value]

    def _averaged(self) -> VAR:
        """The averaged weights as a plain VAR."""
        return merged(self.ema.model) if has_adapters(self.ema.model) else self.ema.model

    def _too_far(self) -> bool:
        return 0 < self.config.stop_kl < self.progress.kl

    def _parts(self, mask: torch.Tensor) -> list[tuple[list[int], bool]]:
        """This process's rows in micro-batches. Rows without a token to train are left out; as all processes must run
        as many passes, one with fewer repeats a row, which then counts for nothing."""
        wanted = (mask > 0).any(1).nonzero()[:, 0].tolist()
        size = self.config.micro_batch or len(mask)
        parts = [(wanted[i : i + size], True) for i in range(0, len(wanted), size)]
        most = int(self.accelerator.gather(torch.tensor([len(parts)], device=mask.device)).max())
        return [([0], False)] * (most - len(parts)) + parts

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _total(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _mean(self, value: float) -> float:
        return self._total(value) / self.accelerator.num_processes

    def _read(
        self, sums: dict[str, torch.Tensor], gaps: torch.Tensor, norm: torch.Tensor
    ) -> tuple[dict[str, float], list[float], float]:
        """On the host, in one go: sums over all processes, the largest gap (n, L') of each scale, and the norm."""
        accelerator = self.accelerator
        lengths = self.policy.schedule.with_num_tokens(gaps.shape[1]).lengths
        values = torch.stack([value.to(accelerator.device, torch.float64) for value in sums.values()])
        worst = accelerator.gather(torch.stack([part.amax() for part in gaps.split(lengths, 1)])[None]).amax(0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found = torch.cat([accelerator.reduce(values, "sum"), worst.double(), norm.double().reshape(1)]).tolist()
        return dict(zip(sums, found, strict=False)), found[len(sums) : -1], found[-1]

    def _settings(self) -> dict[str, Any]:
        settings = {
            "rl": self.config.settings(),
            "model": asdict(self.policy.config),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "start": self.fingerprint,
            "rewards": {**self.reward.weights, "standardise": self.reward.standardise, **self._reward_options()},
            "prompts": self.prompts.fingerprint(),
        }
        return json.loads(json_text(settings))

    def _reward_options(self) -> dict[str, Any]:
        """What tells a reward from another one of its name: plain public attributes."""
        plain = (bool, int, float, str, tuple, list)
        return {
            f"{name}.{option}": value
            for name, reward in self.reward.rewards.items()
            for option, value in getattr(reward, "__dict__", {}).items()
            if not option.startswith("_") and isinstance(value, plain)
        }


class RewardError(RuntimeError):
    """A reward raised, answered in a wrong shape or only with NaN; names it."""


class Graded(NamedTuple):
    """What a rollout's rows are worth.

    Attributes:
        advantages: (n,) of this process's rows.
        mask: (n, L') which tokens are to be trained.
        totals: (K',) sums of all processes' masks over each scale's tokens.
        parts: the rows of each micro-batch, see `VMRGRPOTrainer._parts`; none where there is nothing to learn.
        metrics: for the log.
    """

    advantages: torch.Tensor
    mask: torch.Tensor
    totals: torch.Tensor
    parts: list[tuple[list[int], bool]]
    metrics: dict[str, float]


class _Progress:
    """What a run has to remember besides its weights."""

    def __init__(self) -> None:
        self.skipped, self.skipped_in_all = 0, 0
        self.best, self.kl = -math.inf, 0.0

    def state_dict(self) -> dict[str, Any]:
        # JSON has no infinity; what is left out is as at the start.
        return {name: value for name, value in vars(self).items() if math.isfinite(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _clear(output: Path) -> None:
    """Forget what a run that was here before has shown."""
    for name in ("best", "pictures", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "metrics.jsonl").unlink(missing_ok=True)
