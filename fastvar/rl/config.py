"""The settings of VMR-GRPO."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvar.rl.rollout import RolloutOptions, Segment
from fastvar.rl.update import LossOptions

# The largest mean difference between the log-probabilities of rollout and training that counts as rounding. In bf16
# logits carry 8 bits: single tokens differ by some hundredths, their mean by much less.
TOLERANCES = {"no": 1e-3, "bf16": 3e-2}

# Settings that change what a run shows, keeps and needs, or when it stops, but not what an iteration learns.
FREE = (
    *("iterations", "stop_kl", "tolerance", "bad_steps"),
    *("micro_batch", "gradient_checkpointing"),
    *("log_every", "evaluate_every", "evaluation_samples", "save_every", "save_minutes", "keep", "resume"),
)


@dataclass(frozen=True)
class RLConfig:
    """How to train with rewards. `middle=0` with `LossOptions(panw_alpha=0)` is plain GRPO."""

    iterations: int = 100
    """Rollouts in all. A run that was stopped or has finished can go on to more, as if it had been meant for them."""
    prompts: int = 4
    """Groups per rollout, over all processes."""
    group_size: int = 8
    """G, samples of a prompt."""
    middle: int = 2
    """m: scales before it are the coarse segment; 0 trains all scales at once."""
    continuations: int = 2
    """K, continuations of a coarse segment that make its return."""
    eta: float = 1.0
    """Temperature of the soft value over the continuations."""
    coarse_updates: int = 3
    """Rollouts of the coarse segment before those of the fine one."""
    fine_updates: int = 1
    """Rollouts of the fine segment in a row."""
    updates: int = 1
    """Optimizer steps on each rollout. After the first one the ratio to the policy before it is clipped."""
    rescore: bool = True
    """With several updates: take the old log-probabilities from the first update's forward pass. Otherwise they are
    the rollout's, which is refused if the two do not agree."""
    tolerance: float = 0.0
    """Largest mean difference between the log-probabilities of rollout and training; 0 for that of the precision, 1e-3
    in float32 and 3e-2 in bf16. More stops the run, as it would train another policy than was drawn from."""
    filter_groups: bool = True
    """Leave out groups whose returns are all equal: they have no advantage, only a KL."""
    use_mask: bool = False
    """Train only the tokens where the reward was decided; for local rewards."""
    stop_kl: float = 0.0
    """Stop the run where an update's KL to the reference is larger; 0 never does. Needs a KL weight."""
    micro_batch: int = 0
    """Segments of one forward and backward pass on each process; 0 for all at once. It does not change gradients."""
    precision: str = "no"
    """"no" (float32) or "bf16" (autocast, in rollouts and updates alike)."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    learning_rate: float = 1e-5
    """Constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.05
    """Of linear layers and convolutions."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.95
    """Of the averaged weights, which are evaluated and saved as the model."""
    bad_steps: int = 5
    """Updates in a row that may be skipped, as their gradient is not finite; one more stops the run."""
    evaluate_every: int = 0
    """Iterations between two evaluations of the averaged weights, on fixed prompts and seeds; 0 for none."""
    evaluation_samples: int = 64
    """Images of an evaluation."""
    seed: int = 0
    """Of prompts and rollouts."""
    log_every: int = 1
    """Iterations between two lines of metrics."""
    save_every: int = 20
    """Iterations between two checkpoints."""
    save_minutes: float = 5.0
    """Also save when so many minutes have passed since the last checkpoint, but never for more than a twentieth of the
    time; 0 for not."""
    keep: int = 2
    """Checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one."""
    loss: LossOptions = field(default_factory=LossOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)

    def segment(self, iteration: int) -> Segment:
        """What an iteration trains."""
        if self.middle == 0:
            return "whole"
        place = iteration % (self.coarse_updates + self.fine_updates)
        return "coarse" if place < self.coarse_updates else "fine"

    @property
    def largest_difference(self) -> float:
        """The tolerance that holds."""
        return self.tolerance or TOLERANCES[self.precision]

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense."""
        cycle = (self.coarse_updates, self.fine_updates)
        least_one = ("iterations", "prompts", "continuations", "updates")
        checks: dict[str, tuple[bool, str]] = {
            **{
                name: (getattr(self, name) >= 1, "at least 1")
                for name in (*least_one, "log_every", "save_every", "keep")
            },
            **{
                name: (getattr(self, name) >= 0, "at least 0")
                for name in ("micro_batch", "evaluate_every", "bad_steps")
            },
            **{name: (getattr(self, name) >= 0, "at least 0") for name in ("tolerance", "stop_kl", "middle", "seed")},
            "save_minutes": (0 <= self.save_minutes < math.inf, "at least 0"),
            "group_size": (self.group_size >= 2, "at least 2, as advantages are differences within a group"),
            "evaluation_samples": (self.evaluation_samples >= 8, "at least 8"),
            "eta": (self.eta > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "ema_decay": (0 <= self.ema_decay < 1, "at least 0 and below 1"),
            "precision": (self.precision in TOLERANCES, f"one of {tuple(TOLERANCES)}"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"RLConfig: {name}: expected {expected}, got {getattr(self, name)}")
        if self.middle and (min(cycle) < 0 or not any(cycle)):
            raise ValueError(f"RLConfig: coarse_updates, fine_updates: expected none below 0, not both 0, got {cycle}")
        self.loss.check()
        self.rollout.check()
        if self.stop_kl and not self.loss.kl_weight:
            raise ValueError("RLConfig: stop_kl: expected 0 without a KL weight, as the KL is then not measured")

    def settings(self) -> dict[str, Any]:
        """What decides the result of a run."""
        found = {name: value for name, value in asdict(self).items() if name not in FREE}
        del found["rollout"]["chunk"], found["rollout"]["graphs"]
        return found
