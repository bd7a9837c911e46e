"""Reinforcement learning: what a policy is rewarded for, and what it learns from it."""

from fastvar.rl.returns import middle_returns
from fastvar.rl.rollout import Rollout, RolloutOptions, coarse_rollout, fine_rollout, whole_rollout
from fastvar.rl.trainer import RLConfig, VMRGRPOTrainer
from fastvar.rl.update import LossOptions, segment_loss

__all__ = [
    "LossOptions",
    "RLConfig",
    "Rollout",
    "RolloutOptions",
    "VMRGRPOTrainer",
    "coarse_rollout",
    "fine_rollout",
    "middle_returns",
    "segment_loss",
    "whole_rollout",
]
