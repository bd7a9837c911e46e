"""Reinforcement learning with a reward of your own: any function of images, prompts and references.

Only low-rank adapters are trained (the extra `lora`); what is saved is a plain model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from fastvar.models import VAR
from fastvar.ops import PolicyLossOptions
from fastvar.rl import Prompts, RLConfig, VMRGRPOTrainer, add_adapters
from fastvar.rl.rewards import RewardSum


def warmth(images: torch.Tensor, prompts: Sequence[str], references: torch.Tensor | None) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] to (B,): how much redder than blue an image is."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def main(model: Path, output: Path, iterations: int = 100, group_size: int = 8) -> None:
    var = add_adapters(VAR.from_pretrained(model), rank=16)
    classes = torch.arange(var.config.num_classes)
    prompts = Prompts([str(label) for label in classes.tolist()], classes)
    config = RLConfig(
        iterations=iterations,
        prompts=2,
        group_size=group_size,
        middle=1,  # scales before it are the coarse segment
        learning_rate=1e-4,
        loss=PolicyLossOptions(panw_alpha=0.6, kl_weight=0.01),
    )
    VMRGRPOTrainer(var, RewardSum({"warmth": warmth}), prompts, config, output).train()


if __name__ == "__main__":
    tyro.cli(main)
