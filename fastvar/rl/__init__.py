"""Reinforcement learning: what a policy is rewarded for, and what it learns from it."""

import fastvar.threads  # noqa: F401  # before torch comes
from fastvar.rl.adapters import add_adapters, merged, without_adapters
from fastvar.rl.config import RLConfig
from fastvar.rl.evaluate import Evaluation, evaluate_policy
from fastvar.rl.prompts import Prompts
from fastvar.rl.returns import middle_returns
from fastvar.rl.rollout import Rollout, roll_out
from fastvar.rl.scores import Scores, score
from fastvar.rl.trainer import VMRGRPOTrainer
from fastvar.rl.update import LossOptions, segment_loss, token_totals

__all__ = [
    "Evaluation",
    "LossOptions",
    "Prompts",
    "RLConfig",
    "Rollout",
    "Scores",
    "VMRGRPOTrainer",
    "add_adapters",
    "evaluate_policy",
    "merged",
    "middle_returns",
    "roll_out",
    "score",
    "segment_loss",
    "token_totals",
    "without_adapters",
]
