"""The evaluations during a run: metrics, pictures over time, and the best weights so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastvar.models import Model
from fastvar.pictures import image_grid, save_picture
from fastvar.rl.adapters import plain
from fastvar.rl.config import RLConfig
from fastvar.rl.evaluate import draw_evaluation, score_evaluation, summarise
from fastvar.rl.processes import Processes
from fastvar.rl.progress import Progress
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.training.log import RunLog
from fastvar.training.sharded import called


class RunEvaluations:
    """Evaluates a model on fixed prompts and seeds, shared out among the processes.

    Args:
        prompts: to choose from.
        reward: what scores.
        config: how many samples, and how they are drawn.
        output: the run's folder, which gets `pictures/` and `best/`.
        processes: of the run.
        progress: knows the best evaluation so far.
        whole: of a model that is evaluated: one that can be saved, see `fastvar.training.sharded.Blueprint`.

    Raises:
        ValueError: held-out rewards that no evaluation would ask.
    """

    def __init__(
        self,
        prompts: Prompts,
        reward: RewardSum,
        config: RLConfig,
        output: Path,
        processes: Processes,
        progress: Progress,
        whole: Callable[[Model], Model],
    ) -> None:
        if reward.held_out and not config.evaluate_every:
            held_out = tuple(reward.held_out)
            raise ValueError(
                f"RLConfig: evaluate_every: expected at least 1, as rewards are held out {held_out}, got 0"
            )
        self.prompts, self.reward, self.config = prompts, reward, config
        self.output, self.processes, self.progress, self.whole = output, processes, progress, whole

    def __call__(self, model: Model, done: int, log: RunLog) -> dict[str, float]:
        """Metrics of the model after `done` iterations; where it is better than all before it is kept.

        Raises:
            RewardError: a reward misbehaved.
        """
        processes, reward = self.processes, self.reward
        drawn = called(
            model,
            draw_evaluation,
            self.prompts,
            samples=self.config.evaluation_samples,
            options=self.config.rollout,
            share=(processes.index, processes.count),
        )
        part = processes.rewarded(lambda: score_evaluation(drawn, reward))
        parts = processes.objects(part)
        evaluation = processes.rewarded(lambda: summarise(parts, reward))
        total = evaluation.metrics["return"]
        better = processes.any(total > self.progress.best)  # all have to put it together, or none
        self.progress.best = max(total, self.progress.best)
        best = self.whole(model) if better else None
        if processes.main:
            picture = image_grid(evaluation.images[:64], 8)
            save_picture(picture, self.output / "pictures" / f"step-{done:08d}.png")
            log.picture(done, "samples", picture)
            if best is not None:
                plain(best).save_pretrained(self.output / "best")
        processes.accelerator.wait_for_everyone()
        return {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
