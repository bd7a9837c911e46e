"""VMR-GRPO: a VAR learns from rewards, its coarse and its fine scales in turns."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvar.files import write_json
from fastvar.models import VAR
from fastvar.ops import PolicyLoss
from fastvar.rl.rewards import RewardSum
from fastvar.rl.rollout import Rollout, RolloutOptions, coarse_rollout, fine_rollout, whole_rollout
from fastvar.rl.update import LossOptions, segment_loss
from fastvar.training.checkpoints import checkpoint_folder, remove_checkpoints, save_checkpoint, saved_steps
from fastvar.training.ema import EMA
from fastvar.training.log import RunLog
from fastvar.training.loop import check_same_settings, parameter_groups


@dataclass(frozen=True)
class RLConfig:
    """How to train with rewards. `middle=0` with `LossOptions(panw_alpha=0)` is plain GRPO."""

    iterations: int = 100
    """Rollouts, each with one update."""
    prompts: int = 4
    """Groups per rollout."""
    group_size: int = 8
    """G, samples of a prompt."""
    middle: int = 2
    """m: scales before it are the coarse segment; 0 trains all scales at once."""
    continuations: int = 2
    """K, continuations of a coarse segment that make its return."""
    eta: float = 1.0
    """Temperature of the soft value over the continuations."""
    coarse_updates: int = 3
    """Updates of the coarse segment before each of the fine one."""
    fine_updates: int = 1
    """Updates of the fine segment in a row."""
    use_mask: bool = False
    """Train only the tokens where the reward was decided; helps local rewards, harms global ones."""
    learning_rate: float = 1e-5
    """Constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.05
    """Of linear layers and convolutions."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.95
    """Of the averaged weights, which are saved as the model."""
    bad_steps: int = 5
    """Updates in a row that may be skipped, as their gradient is not finite, before the run stops."""
    seed: int = 0
    """Of prompts and rollouts."""
    log_every: int = 1
    """Iterations between two lines of metrics."""
    save_every: int = 20
    """Iterations between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one."""
    loss: LossOptions = field(default_factory=LossOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)

    def phase(self, iteration: int) -> str:
        """What an iteration trains: "whole", "coarse" or "fine"."""
        if self.middle == 0:
            return "whole"
        place = iteration % (self.coarse_updates + self.fine_updates)
        return "coarse" if place < self.coarse_updates else "fine"


# Settings that change what a run shows and keeps, but not what it learns.
_FREE = ("iterations", "log_every", "save_every", "keep", "resume")


class VMRGRPOTrainer:
    """Trains a VAR with a text condition on a reward; one process.

    Each iteration draws a rollout (`fastvar.rl.rollout`), scores it, and makes one update (`fastvar.rl.update`). The
    policy stays in evaluation mode: what is trained is what is drawn from. An interrupted run goes on where it stopped,
    with the same numbers.

    Args:
        policy: the model, with its tokenizer; trained in place.
        reward: what scores images.
        prompts: texts to draw from.
        config: how.
        output: the run's folder.
        reference: the model that the KL holds the policy to; a copy of the policy as it is now if the weight is not 0.

    Raises:
        ValueError: settings that do not fit, nothing to train.
    """

    def __init__(
        self,
        policy: VAR,
        reward: RewardSum,
        prompts: Sequence[str],
        config: RLConfig,
        output: Path,
        reference: VAR | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("VMRGRPOTrainer: prompts: expected at least one, got none")
        for name in ("iterations", "prompts", "group_size", "continuations", "log_every", "save_every", "keep"):
            if getattr(config, name) < 1:
                raise ValueError(f"RLConfig: {name}: expected at least 1, got {getattr(config, name)}")
        updates = (config.coarse_updates, config.fine_updates)
        if config.middle and (min(updates) < 0 or not any(updates)):
            raise ValueError(
                f"RLConfig: coarse_updates, fine_updates: expected none below 0, not both 0, got {updates}"
            )
        self.policy = policy.eval()
        self.policy.tokenizer.requires_grad_(False).eval()
        self.reward, self.prompts, self.config, self.output = reward, list(prompts), config, output
        self.optimizer = torch.optim.AdamW(
            parameter_groups(policy, config.weight_decay), lr=config.learning_rate, betas=config.betas
        )
        self.ema = EMA(policy, config.ema_decay)
        self.reference = reference
        if reference is None and config.loss.kl_weight != 0:
            self.reference = policy.fresh().to(policy.device)
            self.reference.load_state_dict(policy.state_dict())
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        self.skipped = 0

    def train(self) -> VAR:
        """Run all iterations, or those that are left, and return the averaged policy; it is saved in `output/model`.

        Raises:
            ValueError: `output` holds a run with other settings.
            RuntimeError: a reward misbehaved, or too many updates in a row had a gradient that is not finite.
        """
        from accelerate import Accelerator

        config, output = self.config, self.output
        accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        if accelerator.num_processes > 1:
            raise ValueError(f"VMRGRPOTrainer: expected one process, got {accelerator.num_processes}")
        self.policy, self.optimizer = accelerator.prepare(self.policy.to(accelerator.device), self.optimizer)
        accelerator.register_for_checkpointing(self.ema, _Counter(self))
        settings = self._settings()
        steps = saved_steps(output) if config.resume else []
        first = steps[-1] if steps else 0
        if steps:
            check_same_settings(output / "settings.json", settings)
            accelerator.load_state(str(checkpoint_folder(output, first)))
        else:
            remove_checkpoints(output)
            (output / "metrics.jsonl").unlink(missing_ok=True)
            write_json(output / "settings.json", settings)
        log = RunLog(output, first, config.iterations, title="vmr-grpo")
        try:
            for iteration in range(first, config.iterations):
                metrics = self.iteration(iteration)
                done, last = iteration + 1, iteration + 1 == config.iterations
                log.advance()
                if done % config.log_every == 0 or last:
                    log.write(done, metrics)
                if done % config.save_every == 0 or last:
                    save_checkpoint(accelerator, output, done, config.keep)
        finally:
            log.close()
        self.ema.model.save_pretrained(output / "model")
        return self.ema.model

    def iteration(self, iteration: int) -> dict[str, float]:
        """One rollout and one update; what it measured."""
        start = time.perf_counter()
        rollout = self.roll_out(iteration)
        drawn = time.perf_counter()
        loss = segment_loss(
            self.policy,
            rollout,
            self.config.loss,
            group_size=self.config.group_size,
            temperature=self.config.rollout.temperature,
            reference=self.reference,
        )
        norm = self.update(loss)
        self.ema.update(self.policy)
        return {
            **self.measure(rollout, loss),
            "gradient_norm": norm,
            "skipped": float(self.skipped),
            "phase": float(("whole", "coarse", "fine").index(self.config.phase(iteration))),
            "seconds_rollout": drawn - start,
            "seconds_update": time.perf_counter() - drawn,
        }

    def roll_out(self, iteration: int) -> Rollout:
        """The rollout of an iteration; it follows from the seed, the iteration and the weights."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        chosen = torch.randint(len(self.prompts), (config.prompts,), generator=generator).tolist()
        prompts = [self.prompts[i] for i in chosen]
        common: dict[str, Any] = {
            "group_size": config.group_size,
            "seed": int(torch.randint(2**31 - 2, (1,), generator=generator)),
            "options": config.rollout,
            "use_mask": config.use_mask,
        }
        phase = config.phase(iteration)
        if phase == "whole":
            return whole_rollout(self.policy, prompts, self.reward, **common)
        if phase == "fine":
            return fine_rollout(self.policy, prompts, self.reward, middle=config.middle, **common)
        return coarse_rollout(
            self.policy,
            prompts,
            self.reward,
            middle=config.middle,
            continuations=config.continuations,
            eta=config.eta,
            **common,
        )

    def update(self, loss: PolicyLoss) -> float:
        """One optimizer step; returns the gradient's norm. A gradient that is not finite is dropped and counted."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
            if self.skipped > self.config.bad_steps:
                raise RuntimeError(f"VMRGRPOTrainer: {self.skipped} updates in a row had a gradient that is not finite")
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def measure(self, rollout: Rollout, loss: PolicyLoss) -> dict[str, float]:
        """The figures of an iteration that say whether it learns, and whether it is sound."""
        groups = rollout.returns.view(-1, self.config.group_size)
        start = self.policy.schedule.starts[rollout.first_scale]
        difference = (loss.log_probs - rollout.log_probs)[:, start:].abs().max()
        rewards = {f"reward/{name}": float(scores.nanmean()) for name, scores in rollout.rewards.items()}
        shares = {f"gradient_share/{k}": float(share) for k, share in enumerate(loss.gradient_share)}
        return {
            **rewards,
            "return": float(rollout.returns.nanmean()),
            "spread": float(groups.std(1, correction=0).nanmean()),
            "groups_without_spread": float((groups.amax(1) == groups.amin(1)).float().mean()),
            "loss": float(loss.loss.detach()),
            "kl": float(loss.kl),
            "entropy": float(loss.entropy),
            "clip_fraction": float(loss.clip_fraction),
            "ratio": float(loss.ratio),
            "rollout_difference": float(difference),
            "mask_share": 1.0 if rollout.mask is None else float(rollout.mask.float().mean()),
            **shares,
        }

    def _settings(self) -> dict[str, Any]:
        settings = {
            "rl": {name: value for name, value in asdict(self.config).items() if name not in _FREE},
            "model": asdict(self.policy.config),
            "rewards": self.reward.weights,
            "prompts": {"count": len(self.prompts), "first": self.prompts[0], "last": self.prompts[-1]},
        }
        return json.loads(json.dumps(settings))


class _Counter:
    """The trainer's count of skipped updates, as a thing that checkpoints can hold."""

    def __init__(self, trainer: VMRGRPOTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.trainer.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.trainer.skipped = state["skipped"]
