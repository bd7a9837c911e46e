"""What VMR-GRPO saves by forking cached states and by sharing a subject's prefix, on random weights.

    python -m benchmarks.reinforcement --output benchmarks/data/reinforcement.jsonl

The two ways of each pair alternate round by round in one process; those of updates are checked to give the same
gradients, and forked log-probabilities are checked against teacher forcing by the tests:

* "coarse rollout": G coarse segments with K = 2 continuations that fork the cached state, against G K whole images;
* "fine rollout": G continuations of one coarse segment, against G whole images;
* "subject update": forward and backward with one prefix a group, against a prefix for every row;
* "coarse update": forward and backward on the coarse tokens, against all tokens with the loss on the coarse ones;
* "micro-batches", "checkpointing": forward and backward of all rows by fours, or with blocks recomputed, against plain.

Seconds, and the peak of memory beyond what is held between calls. Rollouts decode their images, as training does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import records
from benchmarks.memory import peak_memory
from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.rl import LossOptions, Prompts, Rollout, RolloutOptions, roll_out, segment_loss, token_totals

GROUP = 8
OPTIONS = RolloutOptions(chunk=1024)
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"grids": ((1, 1), (2, 2), (3, 4), (6, 8)), "depth": 4, "embed_dim": 128, "num_heads": 4, "middle": 3},
    "VAR-256 grids": {
        "grids": tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        "depth": 8,
        "embed_dim": 256,
        "num_heads": 4,
        "middle": 8,
    },
}


def policy(shape: str) -> tuple[VAR, int]:
    """A VAR with a subject prefix on random weights, and its middle scale."""
    sizes = dict(SHAPES[shape])
    middle = sizes.pop("middle")
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        VQTokenizerConfig(
            grids=sizes["grids"],
            vocab_size=256,
            code_channels=16,
            channels=16,
            channel_multipliers=(1, 2),
            blocks_per_level=1,
            norm_groups=8,
            attention=False,
        )
    )
    config = VARConfig(
        vocab_size=256,
        code_channels=16,
        num_classes=0,
        text_length=2,
        subject="block_causal",
        gate_init=1.0,
        **sizes,
    )
    return VAR(config, tokenizer).eval(), middle


def cases(shape: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """By case and way, what to time."""
    var, middle = policy(shape)
    height, width = var.tokenizer.config.image_size
    prompts = Prompts(["12", "34"])
    subjects = Prompts(prompts.texts, references=torch.rand(2, 3, height, width))
    fixed: dict[str, Any] = {"group_size": GROUP, "seed": 1, "options": OPTIONS, "middle": middle}

    def forked(segment: Any) -> Rollout:
        return roll_out(var, prompts, segment=segment, continuations=2, **fixed)

    def from_the_start(segment: Any) -> Any:
        """The same images without forks: as many whole ones are drawn, whatever their coarse tokens."""
        times = 2 if segment == "coarse" else 1
        return roll_out(var, prompts, segment="whole", **{**fixed, "group_size": GROUP * times})

    advantages = torch.arange(2.0 * GROUP) - GROUP + 0.5
    with_subject = roll_out(var, subjects, segment="whole", **fixed)
    coarse = roll_out(var, prompts, segment="coarse", **fixed)
    whole = roll_out(var, prompts, segment="whole", **fixed)
    mask = torch.zeros_like(whole.log_probs)
    mask[:, : coarse.tokens.shape[1]] = 1

    def update(rollout: Rollout, **options: Any) -> torch.Tensor:
        var.zero_grad()
        loss = segment_loss(var, rollout, advantages, LossOptions(), **options).loss
        loss.backward()
        return var.head.weight.grad

    def by_fours() -> torch.Tensor:
        var.zero_grad()
        for first in range(0, 2 * GROUP, 4):
            rows = range(first, first + 4)
            segment_loss(var, whole, advantages, LossOptions(), rows=rows, mask_totals=everything).loss.backward()
        return var.head.weight.grad

    def checkpointed() -> torch.Tensor:
        var.gradient_checkpointing = True
        try:
            return update(whole)
        finally:
            var.gradient_checkpointing = False

    everything = token_totals(torch.ones_like(whole.log_probs), var.schedule)
    plain = update(whole).clone()
    for frugal in (by_fours, checkpointed):
        torch.testing.assert_close(frugal(), plain, rtol=1e-3, atol=1e-5)
    apart = with_subject._replace(group_size=1)
    torch.testing.assert_close(update(with_subject).clone(), update(apart).clone(), rtol=1e-3, atol=1e-5)
    totals = token_totals(mask, var.schedule)
    same_tokens = whole._replace(tokens=whole.tokens[:, : coarse.tokens.shape[1]])
    masked = update(whole, mask=mask, mask_totals=totals).clone()
    torch.testing.assert_close(update(same_tokens).clone(), masked, rtol=1e-3, atol=1e-5)
    return {
        "coarse rollout": {"forked": lambda: forked("coarse"), "from the start": lambda: from_the_start("coarse")},
        "fine rollout": {"forked": lambda: forked("fine"), "from the start": lambda: from_the_start("fine")},
        "subject update": {"shared prefix": lambda: update(with_subject), "prefix each": lambda: update(apart)},
        "coarse update": {"coarse tokens": lambda: update(same_tokens), "all tokens": lambda: update(whole, mask=mask)},
        "micro-batches": {"by fours": by_fours, "all rows": lambda: update(whole)},
        "checkpointing": {"blocks recomputed": checkpointed, "plain": lambda: update(whole)},
    }


@dataclass(frozen=True)
class Arguments:
    output: Path
    """JSON lines are added to this file."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Which shapes."""
    rounds: int = 5
    """Rounds of alternating calls."""


def main(arguments: Arguments) -> None:
    for shape in arguments.shapes:
        for case, ways in cases(shape).items():
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(arguments.rounds + 1):
                for name, call in ways.items():
                    start = time.perf_counter()
                    call()
                    if number:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
            peaks = {name: round(peak_memory(call), 1) for name, call in ways.items()}
            fast, slow = ways
            ratios = records.spread(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))
            record = {
                "benchmark": "reinforcement",
                "shape": shape,
                "case": case,
                "group_size": GROUP,
                "seconds": {name: records.spread(values)._asdict() for name, values in seconds.items()},
                "ratio": ratios._asdict(),
                "peak_mib": peaks,
                "rounds": arguments.rounds,
                **records.provenance(),
            }
            records.append(arguments.output, record)
            print(
                f"{shape}, {case}: {slow} / {fast} = {ratios.median:.2f} ({ratios.low:.2f} to {ratios.high:.2f})", peaks
            )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
