"""The settings of VMR-GRPO."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastvar.models import VAR, Model, SamplingOptions
from fastvar.ops import PolicyLossOptions
from fastvar.ops.policy_loss import NORMALISATIONS, SPREAD_FLOOR
from fastvar.ranges import (
    Count,
    CountOrNone,
    NotNegative,
    NotNegativeOrInfinite,
    OneOf,
    Positive,
    PositiveOrInfinite,
    Range,
    Seed,
    ShareBelowOne,
    check_fields,
)
from fastvar.rl.rollout import Segment

# The largest mean difference between the log-probabilities of rollout and training that counts as rounding. In bf16
# logits carry 8 bits: single tokens differ by some hundredths, their mean by much less.
TOLERANCES = {"no": 1e-3, "bf16": 3e-2}

# What may change when a run goes on: what it shows, keeps and needs, and when it stops; not what an iteration learns.
MAY_CHANGE = (
    *("iterations", "stop_kl", "tolerance", "bad_steps"),
    *("micro_batch", "gradient_checkpointing", "update_graphs"),
    *("log_every", "evaluate_every", "evaluation_samples", "save_every", "save_minutes", "keep", "resume"),
)


@dataclass(frozen=True)
class RLConfig:
    """How to train with rewards. `middle=0` with `PolicyLossOptions(panw_alpha=0)` is plain GRPO."""

    iterations: Count = 100
    """Rollouts in all. A run that was stopped or has finished can go on to more, as if it had been meant for them."""
    prompts: Count = 4
    """Groups per rollout, over all processes."""
    group_size: Annotated[int, Range(2)] = 8
    """G, samples of a prompt; advantages are differences within them. TRL: num_generations."""
    normalise: Annotated[str, OneOf(*NORMALISATIONS)] = "group"
    """What advantages are divided by: the standard deviation of the returns of a "group" or of the whole "batch", or
    "none", nothing. TRL: scale_rewards."""
    spread_floor: NotNegative = SPREAD_FLOOR
    """Added to that standard deviation, so that returns which hardly differ are not blown up."""
    middle: CountOrNone = 2
    """m: scales before it are the coarse segment; 0 trains all scales at once."""
    continuations: Count = 2
    """K, continuations of a coarse segment that make its return."""
    continue_with: Annotated[str, OneOf("policy", "reference")] = "policy"
    """Who draws the continuations: the "policy" as it is, from its cached states, or the "reference" that the KL is
    measured to, as the formula of the paper has it. The reference takes the coarse tokens in first, one pass more."""
    eta: PositiveOrInfinite = 1.0
    """Temperature of the soft value over the continuations: the best of them towards 0, their mean at infinity."""
    coarse_updates: CountOrNone = 3
    """Rollouts of the coarse segment before those of the fine one."""
    fine_updates: CountOrNone = 1
    """Rollouts of the fine segment in a row."""
    updates: Count = 1
    """Optimizer steps on each rollout. After the first one the ratio to the policy before it is clipped. TRL:
    num_iterations."""
    rescore: bool = True
    """With several updates: take the old log-probabilities from the first update's forward pass. Otherwise they are
    the rollout's, which is refused if the two do not agree."""
    tolerance: NotNegativeOrInfinite = 0.0
    """Largest mean difference between the log-probabilities of rollout and training; 0 for that of the precision, 1e-3
    in float32 and 3e-2 in bf16. More stops the run, as it would train another policy than was drawn from."""
    filter_groups: bool = True
    """Leave out groups whose returns are all equal: they have no advantage, only a KL."""
    use_mask: bool = False
    """Train only the tokens where the reward was decided; for local rewards."""
    stop_kl: NotNegative = 0.0
    """Stop the run where an update's KL to the reference is larger; 0 never does. Needs a KL weight."""
    micro_batch: CountOrNone = 0
    """Segments of one forward and backward pass on each process; 0 for all at once. It does not change gradients."""
    precision: Annotated[str, OneOf(*TOLERANCES)] = "no"
    """"no" (float32) or "bf16" (autocast, in rollouts and updates alike)."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    update_graphs: bool = False
    """Run micro-batches by CUDA graphs, which helps where the host is slower than the GPU. On one GPU, in one process.
    The graphs keep the activations of a micro-batch in memory, during rollouts too."""
    learning_rate: Positive = 1e-5
    """The learning rate, the same in all updates."""
    betas: Annotated[tuple[float, float], Range(0, 1, below=True)] = (0.9, 0.95)
    """The betas of AdamW."""
    weight_decay: NotNegative = 0.05
    """Weight decay of linear layers and convolutions; no other parameter decays."""
    clip_norm: PositiveOrInfinite = 1.0
    """Largest norm of the gradient; infinity for no limit. TRL: max_grad_norm."""
    ema_decay: ShareBelowOne = 0.95
    """Decay of the averaged weights, which are evaluated and saved as the model."""
    bad_steps: CountOrNone = 5
    """Updates in a row that may be skipped, as their gradient is not finite; one more stops the run."""
    evaluate_every: CountOrNone = 0
    """Iterations between two evaluations of the averaged weights, on fixed prompts and seeds; 0 for none."""
    evaluation_samples: Annotated[int, Range(8)] = 64
    """Images of an evaluation."""
    seed: Seed = 0
    """Seed of prompts and rollouts."""
    log_every: Count = 1
    """Iterations between two lines of metrics."""
    save_every: Count = 20
    """Iterations between two checkpoints."""
    save_minutes: NotNegative = 5.0
    """Also save when so many minutes have passed since the last checkpoint, but never for more than a twentieth of the
    time; 0 for not."""
    keep: Count = 2
    """Checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one."""
    loss: PolicyLossOptions = field(default_factory=PolicyLossOptions)
    rollout: SamplingOptions = field(default_factory=SamplingOptions)

    def segment(self, iteration: int) -> Segment:
        """What an iteration trains."""
        if self.middle == 0:
            return "whole"
        place = iteration % (self.coarse_updates + self.fine_updates)
        return "coarse" if place < self.coarse_updates else "fine"

    @property
    def reference_continues(self) -> bool:
        """Whether the reference draws continuations of coarse segments."""
        return self.continue_with == "reference" and self.middle > 0 and self.coarse_updates > 0

    @property
    def largest_difference(self) -> float:
        """The tolerance that holds; it cannot be widened where the rollout's log-probabilities are trained with."""
        usual = TOLERANCES[self.precision]
        limit = self.tolerance or usual
        return min(limit, usual) if self.updates > 1 and not self.rescore else limit

    def check(self) -> None:
        """Raise a ValueError that names a setting which makes no sense."""
        check_fields(self)
        if self.middle and not self.coarse_updates and not self.fine_updates:
            raise ValueError("RLConfig: coarse_updates, fine_updates: expected not both 0, as nothing would be trained")
        if self.stop_kl and not self.loss.kl_weight:
            raise ValueError("RLConfig: stop_kl: expected 0 without a KL weight, as the KL is then not measured")

    def settings(self, model: Model | type[Model] = VAR) -> dict[str, Any]:
        """What decides the result of a run of a model; the same for one that was begun before guidance could be None,
        pictures be decoded in tiles and continuations be drawn by the reference."""
        settings = {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}
        if self.continue_with == "policy":
            del settings["continue_with"]
        rollout = settings["rollout"]
        rollout["guidance"] = self.rollout.guidance_of(model)
        if not self.rollout.decode_tile:
            del rollout["decode_tile"]
        del rollout["batch_size"], rollout["graphs"]
        return settings
