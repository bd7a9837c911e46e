"""What can be known to go wrong before the first step: prompts, references, rewards, disk space."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvar.models import Model
from fastvar.rl.prompts import Prompts
from fastvar.rl.rewards import RewardSum
from fastvar.training.space import check_space

_AT_ONCE = 64  # prompts: features of texts are large, and not kept


def before_the_first_step(
    model: Model, prompts: Prompts, evaluation: Prompts, reward: RewardSum, output: Path | None = None
) -> None:
    """All that would stop a run later, perhaps after hours.

    Args:
        model: the policy, on its device.
        prompts, evaluation: of training and of evaluations.
        reward: what is learned from.
        output: the run's folder, or None where nothing is written.

    Raises:
        ValueError: rewards that teach nothing, a prompt that the model cannot draw or a reward cannot score.
        RuntimeError: names a reward that misbehaves.
        OSError: no room for a checkpoint.
    """
    if not any(reward.weights.values()):
        raise ValueError("RewardSum: weights: expected one other than 0, as nothing would be learned")
    if output is not None:
        check_space(output, model)
    for asked in [prompts] if evaluation is prompts else [prompts, evaluation]:
        check_prompts(model, asked)
        reward.check_texts(asked.texts)
        try_rewards(model, asked, reward)


def check_prompts(model: Model, prompts: Prompts) -> None:
    """Raise a ValueError that names a condition which the model does not know, or references which it cannot take."""
    labels, config = prompts.conditions, model.config
    labels = labels.cpu() if isinstance(labels, torch.Tensor) else labels
    for start in range(0, len(labels), _AT_ONCE):
        model.encode(labels[start : start + _AT_ONCE])
    references = prompts.references
    if references is not None:
        if config.subject == "none":
            raise ValueError("Prompts: references: expected None, as the model has no subject prefix")
        size = (3, *model.tokenizer.config.image_size)
        if references.ndim != 4 or references.shape[1:] != size or not references.is_floating_point():
            expected, got = f"floating-point (N, *{size})", f"{references.dtype} {tuple(references.shape)}"
            raise ValueError(f"Prompts: references: expected {expected}, got {got}")
        low, high = (float(bound) for bound in references.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Prompts: references: expected numbers in [0, 1], got {low:g} to {high:g}")


def try_rewards(model: Model, prompts: Prompts, reward: RewardSum) -> None:
    """Ask all rewards once, about two blank pictures for the first prompt.

    Raises:
        RuntimeError: names a reward that misbehaved. That scores are missing is no fault.
    """
    first = prompts.take([0, 0])
    images = torch.full((2, 3, *model.tokenizer.config.image_size), 0.5, device=model.device)
    references = None if first.references is None else first.references.to(model.device)
    try:
        reward.ask(images, first.texts, references, held_out=True)
    except RuntimeError as error:
        raise RuntimeError(f"before the first step, with a blank picture of {first.texts[0]!r}: {error}") from error
